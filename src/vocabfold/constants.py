"""Numbers that data, heads and training must agree on."""

# torch's own default ignore_index: a target of this value is not predicted and not averaged over
IGNORE_INDEX = -100
# the largest seed that every generator of random numbers takes
MOST_SEED = 2**63 - 1
