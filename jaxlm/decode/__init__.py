"""From parameters to new tokens, and from those to text."""
from jaxlm.decode.generate import (State, decode, generate, prefill, start,
                                   stream)
from jaxlm.decode.sampling import Sampling
