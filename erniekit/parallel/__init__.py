"""Who holds what and who talks to whom. The only room that may import paddle.distributed."""
