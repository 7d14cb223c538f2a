"""Text with each token coloured by its first expert."""
import colorsys
import html
import math

from experiments.routing import Seen


class Fragment(str):
  """HTML that a notebook shows as such."""

  def _repr_html_(self) -> str:
    return str(self)


def colours(num_experts: int) -> list[str]:
  """#rrggbb for each expert: hues a golden angle apart, three shades."""
  def colour(expert):
    hue = (0.58 + expert * (3 - math.sqrt(5)) / 2) % 1
    return colorsys.hls_to_rgb(hue, (0.5, 0.62, 0.4)[expert % 3], 0.75)
  return ["#" + "".join(f"{round(255 * x):02x}" for x in colour(expert))
          for expert in range(num_experts)]


TINT = "73"  # of a token's background, so that any ink is readable on it


def show(seen: Seen, layer: int = 0, start: int = 0,
         stop: int | None = 1000) -> Fragment:
  """Tokens `start` to `stop` of the sample, for a notebook.

  Hovering over a token tells its experts and their weights.
  """
  styles = [f"background:{colour}{TINT}" for colour in
            [*colours(seen.num_experts), "#000000"]]
  styles[-1] = ""
  text = spans(seen, layer, start, stop,
               lambda number, expert: f'style="{styles[expert]}"')
  legend = " ".join(
      f'<span style="{style};padding:0 4px">{expert}</span>'
      for expert, style in enumerate(styles[:-1]))
  return Fragment(
      f"<div>first expert, layer {layer}: {legend}</div>"
      '<pre style="white-space:pre-wrap;line-height:1.6;'
      f'overflow-wrap:anywhere">{text}</pre>')


def spans(seen: Seen, layer: int, start: int, stop: int | None,
          attributes) -> str:
  """A <span> for each piece of the text, below its document's name.

  Args:
    attributes: of a piece's number and its first token's first expert.
  """
  expert_NA, weight_NA = of_tokens(seen, layer)
  shown = []
  for number, piece in enumerate(shown_pieces(seen, start, stop)):
    experts, weights = expert_NA[piece.start], weight_NA[piece.start]
    title = describe(experts, weights, seen.num_experts)
    if piece.start in seen.sample.names:
      name = escaped(seen.sample.names[piece.start])
      shown.append(f'<b style="display:block">{name}</b>')
    shown.append(f'<span {attributes(number, experts[0])} title="{title}">'
                 f"{escaped(piece.text)}</span>")
  return "".join(shown)


def shown_pieces(seen: Seen, start: int, stop: int | None):
  stop = seen.sample.tokens_BT.size if stop is None else stop
  return [piece for piece in seen.sample.pieces
          if start <= piece.start and piece.stop <= stop]


def of_tokens(seen: Seen, layer: int):
  """Experts and weights of all tokens in a layer, [N, A]."""
  shape = seen.sample.tokens_BT.size, -1
  return (seen.expert_LBTA[layer].reshape(shape),
          seen.weight_LBTA[layer].reshape(shape))


def describe(experts, weights, num_experts: int) -> str:
  """Such as "expert 3: 0.62, 7: 0.38"."""
  found = ", ".join(f"{expert}: {weight:.2f}" for expert, weight
                    in zip(experts, weights) if expert < num_experts)
  return f"expert {found}" if found else "no expert"


def escaped(text: str) -> str:
  """Text for HTML; control characters by their symbols."""
  return html.escape("".join(
      chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\n\t" else c
      for c in text))


def visible(text: str) -> str:
  """A token by itself, blanks by their symbols; not yet HTML."""
  for blank, symbol in ((" ", "\u2423"), ("\n", "\u21b5"), ("\t", "\u21e5"),
                        ("\r", "\u240d")):
    text = text.replace(blank, symbol)
  return text or "\u2205"
