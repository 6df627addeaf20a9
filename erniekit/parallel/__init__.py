"""Who holds what and who talks to whom. The only room that may import paddle.distributed.

A model is written for one device and is not changed: `training/assemble.py` builds it with this rank's parts and calls
the functions marked * on it. A layout is plain arithmetic, config/layout.py (which ranks share what) and config/cut.py
(what one of them holds); it is judged by config/layout_rules.py. On one rank all of this does nothing.

    a step under          what happens                                                                    where
    tensor parallelism    a matrix lies in slices. Into a block copies go, out of it partial sums         tensor.py *
      and on sequences    are added up; between blocks ranks hold parts of the positions                  tensor.py
                          embedding, loss and log-probabilities: every rank has its part of the words     vocab.py
                          which parameter is sliced how, and which gradients are partial then             styles.py
    expert parallelism    rows go to the ranks that hold their experts, and outputs come back             expert.py *
                          the same on Hopper GPUs                                                         deep_ep.py
                          whose tokens a router's statistics are about                                    tokens.py
    data parallelism      while the backward pass runs, gradients are added up over ranks, flat by flat   zero.py *
      and sharding        each rank updates its range of a flat, then ranges are gathered                 zero.py
                          which numbers lie in which flat, and whose they are                             flat.py
                          stage 3: a layer's weights are whole only while it computes                     layered.py *
    recomputation         a layer's forward runs again in the backward pass                               recompute.py *

Under these lie, from the bottom: collectives.py (Paddle's operations on one axis), store.py (words without a time
limit), pulse.py (what a rank is doing, for the watchdog), mesh.py (all axes of a rank: what everybody is handed) and
passing.py (collectives that gradients pass through, in pairs; most of the mathematics is there). When a model is built,
part.py gives its parameters the sizes of this rank, and whole.py cuts what is drawn or computed whole.

Where to begin: passing.py, then tensor.py, expert.py, zero.py. That parallel equals single is proved in tests/parallel.
"""
