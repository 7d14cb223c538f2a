"""Text to batches: sources, tokenizers, packing and a resumable order."""

from jaxlm.data.bundle import build_dataset
from jaxlm.data.bundle import DataBundle
from jaxlm.data.byte_tokenizer import ByteTokenizer
from jaxlm.data.byte_tokenizer import FimTokens
from jaxlm.data.byte_tokenizer import Tokenizer
from jaxlm.data.documents import Document
from jaxlm.data.documents import sample
from jaxlm.data.documents import split_by_file
from jaxlm.data.fim import apply_fim
from jaxlm.data.fim import fill_in_the_middle
from jaxlm.data.packing import Batch
from jaxlm.data.packing import pack
from jaxlm.data.packing import Rows
from jaxlm.data.pipeline import batches
from jaxlm.data.pipeline import BatchIterator
from jaxlm.data.pipeline import eval_batches
from jaxlm.data.pipeline import Prefetch
from jaxlm.data.pipeline import prefetch
from jaxlm.data.sources import huggingface
from jaxlm.data.sources import load_source
from jaxlm.data.sources import local_files
from jaxlm.data.sources import python_stdlib
from jaxlm.data.tokenizers import HuggingFaceTokenizer
from jaxlm.data.tokenizers import load_tokenizer
from jaxlm.data.tokenizers import TiktokenTokenizer
from jaxlm.data.tokenizers import train_bpe
