"""From parameters to new tokens."""

from jaxlm.decode.generate import decode
from jaxlm.decode.generate import generate
from jaxlm.decode.generate import prefill
