"""The commands that write text: `jaxlm generate` and `jaxlm chat`."""
import argparse
import dataclasses
import itertools
import sys
import time


def add_generate(add):
  command = add(
      "generate", generate, "continue a text",
      "  jaxlm generate SmolLM2.gguf --prompt 'The capital of France is'\n"
      "  jaxlm generate Qwen3-0.6B --prompt 'Once' --temperature 0.8 --seed 3\n"
      "  cat story.txt | jaxlm generate Qwen3-0.6B --stop '\\n\\n'\n\n"
      "The same seed gives the same text.")
  command.add_argument("--prompt", metavar="TEXT",
                       help="what to continue (default: standard input)")
  _add_common(command)


def add_chat(add):
  command = add(
      "chat", chat, "talk with a model",
      "  jaxlm chat SmolLM2.gguf\n"
      "  jaxlm chat SmolLM2.gguf --message 'What is the capital of France?'\n"
      "  jaxlm chat Qwen3-0.6B --no-thinking --system 'Be brief.'\n"
      "  jaxlm chat gpt-oss-20b --reasoning low --show-thinking\n\n"
      "Ctrl-C ends an answer, Ctrl-D the conversation.")
  command.add_argument("--message", metavar="TEXT", action="append",
                       help="say this instead of asking; may be repeated")
  command.add_argument("--system", metavar="TEXT",
                       help="what the model is told about its part")
  command.add_argument("--reasoning", choices=("low", "medium", "high"),
                       help="gpt-oss: how long it thinks (default: medium)")
  command.add_argument("--thinking", action=argparse.BooleanOptionalAction,
                       help="Qwen3: whether it thinks before it answers")
  command.add_argument("--show-thinking", action="store_true",
                       help="gpt-oss: print what it says to itself")
  command.add_argument("--vocabulary", metavar="FILE",
                       help="gpt-oss: o200k_base.tiktoken")
  _add_common(command)


def _add_common(command):
  command.add_argument("source", metavar="SRC",
                       help="a checkpoint in any of the formats")
  command.add_argument("--max-new-tokens", type=int, default=512, metavar="N")
  command.add_argument("--dtype", choices=("float32", "bfloat16", "float16"),
                       help="of the weights and activations (default: float32 "
                       "on a CPU, where it is faster, else bfloat16)")
  command.add_argument("--seed", type=int, default=0)
  command.add_argument("--stop", metavar="TEXT", action="append", default=[],
                       help="end before this text; may be repeated")
  command.add_argument("--stats", action="store_true",
                       help="print tokens a second")
  group = command.add_argument_group("sampling (default: the likeliest token)")
  group.add_argument("--temperature", type=float, default=0.0)
  group.add_argument("--top-k", type=int)
  group.add_argument("--top-p", type=float)
  group.add_argument("--min-p", type=float)
  group.add_argument("--repetition-penalty", type=float)


def _load(args):
  """The model, and how its tokens are chosen."""
  # jax takes a second to import: not for --help.
  import jax
  import jaxlm
  from jaxlm.data.tokenizers import cache_dir
  from jaxlm.decode import Sampling
  # The second time, programs need not be compiled.
  jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))
  sampling = Sampling(**{field.name: getattr(args, field.name)
                         for field in dataclasses.fields(Sampling)})
  sampling.checked()
  default = "float32" if jax.default_backend() == "cpu" else "bfloat16"
  return jaxlm.load(args.source, args.dtype or default), sampling


def _chunks(args, lm, tokens, sampling, seed, stop_tokens):
  """The tokens that follow, as many as the model's context holds."""
  from jaxlm.decode import stream
  most = args.max_new_tokens
  context = lm.about.get("max_position_embeddings")
  if context is not None:
    if len(tokens) >= context:
      raise ValueError(f"{len(tokens)} tokens so far, but the model's context "
                       f"holds {context}: begin anew, or say it in fewer words")
    most = min(most, context - len(tokens))
  return _Counted(stream(
      lm.config, lm.params, tokens, max_new_tokens=most, sampling=sampling,
      seed=seed, stop_tokens=stop_tokens, execution=lm.execution))


def generate(args):
  from jaxlm.decode.text import stream_text
  lm, sampling = _load(args)
  if lm.tokenizer is None:
    raise ValueError(f"{args.source} has no tokenizer.json: put the one it was "
                     "published with beside it")
  prompt = sys.stdin.read() if args.prompt is None else args.prompt
  tokens = lm.tokenizer.encode_prompt(prompt)
  if not len(tokens):
    raise ValueError("the prompt is empty: give --prompt or some standard "
                     "input")
  chunks = _chunks(args, lm, tokens, sampling, args.seed, lm.stop_tokens)
  for text in stream_text(chunks, lm.tokenizer,
                          [_unescaped(stop) for stop in args.stop]):
    print(text, end="", flush=True)
  print()
  if args.stats:
    chunks.report()


def chat(args):
  from jaxlm.decode.chat import chat_format
  lm, sampling = _load(args)
  format_ = chat_format(
      lm, thinking=args.thinking, reasoning=args.reasoning,
      vocabulary=args.vocabulary,
      stop_strings=[_unescaped(stop) for stop in args.stop])
  messages = []
  if args.system is not None:
    messages.append({"role": "system", "content": args.system})
  for turn, said in enumerate(args.message or _asked()):
    messages.append({"role": "user", "content": said})
    answer = _answer(args, lm, format_, messages, sampling, args.seed + turn)
    messages.append({"role": "assistant", "content": answer})


def _asked():
  """What the user types, line by line."""
  import readline  # gives input() a history and editing
  del readline
  while True:
    try:
      said = input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
      return
    if said:
      yield said


def _answer(args, lm, format_, messages, sampling, seed) -> str:
  """Prints an answer and returns what of it is final."""
  chunks = _chunks(args, lm, format_.prompt(messages), sampling, seed,
                   format_.stop_tokens)
  final = ""
  try:
    pieces = format_.pieces(chunks)
    for channel, group in itertools.groupby(pieces, lambda p: p.channel):
      if channel == "final":
        for piece in group:
          final += piece.text
          print(piece.text, end="", flush=True)
      elif args.show_thinking:
        print(f"[{channel}] ", end="")
        for piece in group:
          print(piece.text, end="", flush=True)
        print("\n")
  except KeyboardInterrupt:
    print(" [stopped]", end="")
    if args.message:
      print()
      raise
  print()
  if args.stats:
    chunks.report()
  return final


class _Counted:
  """Chunks of tokens as they pass, counted and timed."""

  def __init__(self, chunks):
    self._chunks, self._tokens, self._seconds = chunks, [], []

  def __iter__(self):
    start = time.perf_counter()
    for chunk in self._chunks:
      self._tokens.append(len(chunk))
      self._seconds.append(time.perf_counter() - start)
      yield chunk

  def report(self):
    """The first chunk, of one token, comes with the prompt's pass; the second
    with the loop's compilation."""
    tokens, seconds = self._tokens, self._seconds
    line = f"{sum(tokens)} tokens, the first after {seconds[0]:.1f} s"
    if len(tokens) > 3:
      rate = sum(tokens[2:-1]) / (seconds[-2] - seconds[1])
      line += f", {rate:.1f} tokens/s once compiled"
    print(line, file=sys.stderr)


def _unescaped(text: str) -> str:
  r"""\n and \t, which are hard to type in a shell."""
  return text.replace(r"\n", "\n").replace(r"\t", "\t")
