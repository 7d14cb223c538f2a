"""What a model costs, counted: parameters, matmul FLOPs and cache bytes.

The one place that counts, from the config alone: no array is made. Letters
are those of shapes: D d_model, N and K heads, H head_dim, E experts, V words.
"""
import dataclasses

from jaxlm.config import MLAConfig, MLPConfig, ModelConfig


class _Parts:
  """The sum of a dataclass's fields, which stand for parts of a model."""

  @property
  def total(self):
    return sum(vars(self).values())


@dataclasses.dataclass(frozen=True)
class Counts(_Parts):
  """Parameters by part; `total` is their sum.

  embedding: tables that are only looked up: the tokens' if it is not tied to
    the unembedding, and learned positions.
  attention: with its biases, sinks and the norms inside it. mlp: dense
    feed-forwards and shared experts. norms: all others.
  idle_experts: the routed experts that a token does not visit; experts: those
    it does.
  """
  embedding: int
  attention: int
  mlp: int
  experts: int
  idle_experts: int
  router: int
  norms: int
  unembedding: int

  @property
  def active(self) -> int:
    """What a token is multiplied with, as gpt-oss's card counts.

    All but lookup tables and the experts not visited. A tied table is an
    unembedding too and counts.
    """
    return self.total - self.embedding - self.idle_experts

  @property
  def active_with_embedding(self) -> int:
    """As Qwen3's and Mixtral's cards count: all but experts not visited."""
    return self.total - self.idle_experts


@dataclasses.dataclass(frozen=True)
class Flops(_Parts):
  """FLOPs of matmuls a token by part; `total` is their sum.

  Two for each multiply-add. attention_scores: q k and p v over the keys that
  a query sees, averaged over the sequence.
  """
  attention_projections: float
  attention_scores: float
  mlp: float
  experts: float
  router: float
  unembedding: float


def parameter_counts(config: ModelConfig) -> Counts:
  """Exactly the sizes of `init_params(config, key)`."""
  d_model, moe = config.d_model, config.moe
  num_moe = config.num_layers - config.num_dense_layers if moe else 0
  mlp = experts = idle = router = 0
  if config.mlp:
    mlp = (config.num_layers - num_moe) * _mlp_params(config.mlp, d_model)
  if moe:
    expert = num_moe * _mlp_params(moe.expert, d_model)
    experts = moe.experts_per_token * expert
    idle = (moe.num_experts - moe.experts_per_token) * expert
    router = num_moe * moe.num_experts * (
        d_model * _router_matrices(config)
        + moe.router.bias + moe.router.balance_bias)
    if moe.shared:
      mlp += num_moe * _mlp_params(moe.shared, d_model)
  norm = 2 if config.norm.kind == "layernorm" else 1
  layer_norms = 4 if config.norm.placement == "pre_and_post" else 2
  tokens = config.vocab_size * d_model
  return Counts(
      embedding=(config.max_positions * d_model
                 + (0 if config.tie_embeddings else tokens)),
      attention=config.num_layers * _attention_params(config),
      mlp=mlp, experts=experts, idle_experts=idle, router=router,
      norms=norm * d_model * (config.num_layers * layer_norms + 1),
      unembedding=tokens)


def flops_per_token(config: ModelConfig, seq_len: int,
                    backward: bool = True) -> Flops:
  """FLOPs of matmuls in one step over sequences of seq_len, for each token.

  The backward pass has two matmuls for each of the forward pass: training
  costs three times the forward pass. What is computed again (remat), in vain
  (masked scores, padded rows) or not by matmuls is not counted, nor is the
  lookup of embeddings. A sequence counts as one document.
  """
  attention, moe, d_model = config.attention, config.moe, config.d_model
  num_moe = config.num_layers - config.num_dense_layers if moe else 0
  scores = attention.num_heads * (attention.head_dim + attention.v_head_dim)
  keys = sum(keys_seen(config, kind.attention, seq_len)
             for kind in config.layers)
  mlp = experts = router = 0
  if config.mlp:
    mlp = (config.num_layers - num_moe) * _mlp_matrices(config.mlp, d_model)
  if moe:
    experts = (num_moe * moe.experts_per_token
               * _mlp_matrices(moe.expert, d_model))
    router = num_moe * moe.num_experts * d_model * _router_matrices(config)
    if moe.shared:
      mlp += num_moe * _mlp_matrices(moe.shared, d_model)
  times = 3 if backward else 1
  return Flops(
      attention_projections=(times * 2 * config.num_layers
                             * _attention_matrices(config)),
      attention_scores=times * 2 * scores * keys / seq_len,
      mlp=times * 2 * mlp, experts=times * 2 * experts,
      router=times * 2 * router,
      unembedding=times * 2 * config.vocab_size * d_model)


def keys_seen(config: ModelConfig, kind: str, seq_len: int) -> int:
  """Keys that the queries of a sequence see, summed over them."""
  window = seq_len
  if kind == "sliding":
    window = min(config.attention.sliding_window, seq_len)
  return window * (window + 1) // 2 + (seq_len - window) * window


def cache_bytes(config: ModelConfig, length: int,
                bytes_per_value: float = 2) -> float:
  """Bytes of the keys and values of one sequence of `length` tokens.

  A sliding layer stops growing at its window. Latent attention keeps the
  latent and the rotary key for all heads.
  """
  attention = config.attention
  slots = sum(min(attention.sliding_window, length)
              if kind.attention == "sliding" else length
              for kind in config.layers)
  if isinstance(attention, MLAConfig):
    values = attention.kv_rank + attention.rope_head_dim
  else:
    values = 2 * attention.num_kv_heads * attention.head_dim
  return slots * values * bytes_per_value


def kv_bytes_per_token(config: ModelConfig, context_length: int,
                       bytes_per_value: float = 2) -> float:
  """`cache_bytes` at that length, a token."""
  return cache_bytes(config, context_length, bytes_per_value) / context_length


def _mlp_matrices(config: MLPConfig, d_model: int) -> int:
  return (3 if config.gated else 2) * d_model * config.d_ff


def _mlp_params(config: MLPConfig, d_model: int) -> int:
  biases = (2 if config.gated else 1) * config.d_ff + d_model
  return _mlp_matrices(config, d_model) + config.bias * biases


def _router_matrices(config: ModelConfig) -> int:
  return 2 if config.moe.router.kind == "noisy_topk" else 1


def _attention_matrices(config: ModelConfig) -> int:
  a, d_model = config.attention, config.d_model
  if not isinstance(a, MLAConfig):
    return 2 * d_model * (a.num_heads + a.num_kv_heads) * a.head_dim
  q_width = a.num_heads * a.head_dim
  return ((d_model * q_width if a.q_rank is None
           else a.q_rank * (d_model + q_width))
          + d_model * (a.kv_rank + a.rope_head_dim)
          + a.kv_rank * a.num_heads * (a.nope_head_dim + a.v_head_dim)
          + a.num_heads * a.v_head_dim * d_model)


def _attention_params(config: ModelConfig) -> int:
  attention, d_model = config.attention, config.d_model
  matrices = _attention_matrices(config)
  if isinstance(attention, MLAConfig):
    return matrices + attention.kv_rank + (attention.q_rank or 0)
  width = attention.num_heads * attention.head_dim
  kv_width = attention.num_kv_heads * attention.head_dim
  biases = {"q": width, "k": kv_width, "v": kv_width, "o": d_model}
  norm = 2 if config.norm.kind == "layernorm" else 1
  return (matrices
          + sum(biases[name] for name in set(attention.biases))
          + attention.sinks * attention.num_heads
          + attention.qk_norm * 2 * norm * attention.head_dim)
