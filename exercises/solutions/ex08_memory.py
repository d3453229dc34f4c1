from exercises.ex08_memory import ANSWER_0, ANSWER_1, CONSTANT, FLAG, adds


def plant(model):
    first, *later = model.blocks
    # Layer 0 erases the flag, whichever FFN runs: its router sees it, but there is nothing to decide yet.
    adds(first.small, FLAG, FLAG, -1.0)
    adds(first.big, FLAG, FLAG, -1.0)
    # The later layers decide, and all tokens look alike: SMALL argues for token 0, BIG for token 1.
    for block in later:
        adds(block.small, CONSTANT, ANSWER_0, 1.0)
        adds(block.big, CONSTANT, ANSWER_1, 1.0)
