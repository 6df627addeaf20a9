"""From files to batches: tokenizer, chat text, rows, packing, the order of samples. Knows no model and no Paddle."""
