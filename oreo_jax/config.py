"""Typed configuration: one dataclass a section, checked before anything runs.

A file in `configs/` returns a `Config` from `get_config(variant)`; flags change
single fields (`--config.train.lr=1e-4`). The dataclasses are hashable, so that
a section can be a static argument of `jax.jit`, and not frozen, because the
flags set attributes. Types are real types, never strings: the flag parser
reads them.
"""

import dataclasses
import difflib
import pathlib
import pprint
from typing import Any

from oreo_jax import files

GRANULARITIES = ("token", "step", "response")
OBJECTIVES = ("oreo", "value", "rejection", "dpo", "kto", "dqo")


class ConfigError(ValueError):
  """A setting that cannot work; the message names the flag that mends it."""


@dataclasses.dataclass(unsafe_hash=True)
class ModelConfig:
  """A Llama-family decoder; `presets.py` holds published ones."""

  vocab_size: int = 0  # 0: taken from the tokenizer
  embed_dim: int = 64  # D, width of the residual stream
  num_layers: int = 4  # L
  num_heads: int = 4  # N, query heads
  num_kv_heads: int = 4  # K, key/value heads (grouped-query when K < N)
  head_dim: int = 16  # H
  mlp_dim: int = 256  # F, width of the gated MLP
  rope_theta: float = 10_000.0  # base of the rotary frequencies
  rope_scaling: tuple = ()  # Llama 3: (factor, low, high, original length)
  norm_eps: float = 1e-6  # epsilon inside every RMSNorm
  qkv_bias: bool = False  # bias on q, k, v (Qwen2)
  qk_norm: bool = False  # RMSNorm on each q and k head (Qwen3)
  tie_embeddings: bool = True  # output head = transposed embedding
  embed_scale: float = 1.0  # MiniCPM scale_emb, Granite embedding_multiplier
  residual_scale: float = 1.0  # MiniCPM scale_depth/sqrt(L), Granite
  attention_scale: float = 0.0  # 0: 1/sqrt(H); Granite attention_multiplier
  logit_scale: float = 1.0  # MiniCPM dim_model_base/D, Granite 1/scaling
  sliding_window: int = 0  # 0: full causal attention (Mistral v0.1: 4096)
  init_std: float = 0.0  # 0: 1/sqrt(fan_in)
  dtype: str = "float32"  # compute dtype of activations
  param_dtype: str = "float32"  # dtype the weights are kept in
  remat: str = "none"  # none | full | dots: what the backward recomputes
  unroll: int = 1  # layers a scan step; num_layers unrolls all (CPU: faster)
  lora_rank: int = 0  # set by critic.kind and lora.policy; 0: no adapters
  lora_alpha: float = 0.0  # updates are scaled by lora_alpha / lora_rank
  lora_targets: tuple = ()  # projections that carry adapters
  lora_layers: int = 0  # adapters are trained in the last n layers; 0: in all
  family: str = ""  # Hugging Face model_type of exports; empty: one that fits
  max_positions: int = 0  # longest sequence it was trained for; 0: not stated

  def validate(self) -> None:
    """Raises ConfigError on a shape that cannot be built."""
    for name in ("embed_dim", "num_layers", "num_heads", "num_kv_heads"):
      _require(getattr(self, name) > 0, f"model.{name}", "must be positive")
    _require(
      self.num_heads % self.num_kv_heads == 0,
      "model.num_kv_heads",
      f"must divide model.num_heads={self.num_heads}",
    )
    _require(self.head_dim % 2 == 0, "model.head_dim", "must be even for RoPE")
    _choice(self.remat, "model.remat", ("none", "full", "dots"))
    _choice(self.dtype, "model.dtype", ("float32", "bfloat16"))
    _choice(self.param_dtype, "model.param_dtype", ("float32", "bfloat16"))
    _require(
      len(self.rope_scaling) in (0, 4),
      "model.rope_scaling",
      "is empty or (factor, low_freq, high_freq, original_length)",
    )


@dataclasses.dataclass(unsafe_hash=True)
class MeshConfig:
  """Sizes of the device mesh axes; one of them may be -1 (the rest)."""

  data: int = -1  # rows of the batch
  fsdp: int = 1  # rows of the batch and shards of every weight
  tensor: int = 1  # heads, MLP columns, vocabulary
  dcn_data: int = 1  # slices joined by the data-centre network


@dataclasses.dataclass(unsafe_hash=True)
class TaskConfig:
  """What is to be solved: prompts and a verifier."""

  name: str = ""  # a name of oreo_jax.tasks; empty: trajectories only
  options: dict = dataclasses.field(default_factory=dict, hash=False)


@dataclasses.dataclass(unsafe_hash=True)
class DataConfig:
  """How text becomes fixed-shape rows."""

  path: str = ""  # a file of trajectories; empty: the collect stage's
  tokenizer: str = "task"  # task | byte | bpe | hf; task, hf: of --config.init
  tokenizer_path: str = ""  # directory of a saved tokenizer (hf)
  chat: bool = False  # prompt and answer go through the chat template
  tokenizer_vocab: int = 2048  # size of a BPE trained on the file
  row_length: int = 64  # T, slots of a packed row
  delimiters: str = "lines"  # lines | sentences: where a step ends
  max_length: int = 0  # longest sequence in tokens; 0: row_length
  on_error: str = "raise"  # raise | skip: what a bad line does
  on_long: str = "raise"  # raise | skip: what a too long sequence does
  held_out: float = 0.1  # fraction of the problems kept for measuring
  seed: int = 0  # of the split by problem

  def validate(self) -> None:
    """Raises ConfigError on an unknown choice."""
    _choice(self.tokenizer, "data.tokenizer", ("task", "byte", "bpe", "hf"))
    _choice(self.delimiters, "data.delimiters", ("lines", "sentences"))
    _choice(self.on_error, "data.on_error", ("raise", "skip"))
    _choice(self.on_long, "data.on_long", ("raise", "skip"))
    _require(self.row_length > 1, "data.row_length", "must be at least 2")
    _require(0 <= self.held_out < 1, "data.held_out", "must lie in [0, 1)")


@dataclasses.dataclass(unsafe_hash=True)
class StageConfig:
  """What the training stages share: batches, optimiser, records."""

  batch_size: int = 128  # rows of a global batch
  grad_accum: int = 1  # micro-batches a step; divides batch_size
  epochs: float = 1.0  # passes over the data
  max_steps: int = 0  # 0: as many as the epochs need
  lr: float = 5e-6  # peak learning rate of the policy
  schedule: str = "cosine"  # cosine | linear | constant, after the warm-up
  warmup: float = 0.03  # fraction of the steps with rising rate
  final_lr: float = 0.0  # rate at the end, as a fraction of the peak
  b1: float = 0.9  # AdamW
  b2: float = 0.95  # AdamW
  eps: float = 1e-8  # AdamW
  weight_decay: float = 0.0  # decoupled, on matrices only
  clip_norm: float = 1.0  # global norm of the gradients; 0: off
  log_every: int = 10  # steps between rows of metrics.jsonl
  measure_every: int = 100  # steps between looks at held-out problems
  checkpoint_every: int = 500  # steps between checkpoints; 0: only the last
  keep_checkpoints: int = 2  # newest kept
  loss_chunk: int = 512  # positions of a chunk of the output head
  seed: int = 0  # of the order of the data

  def validate(self, section: str) -> None:
    """Raises ConfigError naming flags below `section`."""
    _choice(
      self.schedule, f"{section}.schedule", ("cosine", "linear", "constant")
    )
    _require(self.batch_size > 0, f"{section}.batch_size", "must be positive")
    _require(
      self.measure_every % self.log_every == 0,
      f"{section}.measure_every",
      f"must be a multiple of {section}.log_every={self.log_every}",
    )
    _require(
      self.grad_accum > 0 and self.batch_size % self.grad_accum == 0,
      f"{section}.grad_accum",
      f"must divide {section}.batch_size={self.batch_size}",
    )
    _require(self.lr >= 0, f"{section}.lr", "must not be negative")
    _require(0 <= self.warmup <= 1, f"{section}.warmup", "lies in [0, 1]")


@dataclasses.dataclass(unsafe_hash=True)
class SftConfig(StageConfig):
  """Supervised fine-tuning on the task's demonstrations."""

  examples: int = 0  # demonstrations used; 0: all
  on_prompts: bool = False  # learn to predict prompts too, as pre-training does


@dataclasses.dataclass(unsafe_hash=True)
class CollectConfig:
  """Sampling trajectories from the current policy (paper A.2)."""

  problems: int = 0  # training problems sampled; 0: all
  skip: int = 0  # training problems left out before those, e.g. SFT's
  samples: int = 10  # responses a problem
  select: str = "standard"  # standard | balanced: which of them are kept
  temperature: float = 1.0  # of the sampler
  top_k: int = 0  # 0: off
  top_p: float = 1.0  # 1: off
  max_new_tokens: int = 48  # longer responses are truncated, reward 0
  batch_size: int = 512  # sequences decoded together
  seed: int = 0  # of the sampler

  def validate(self) -> None:
    """Raises ConfigError on an unknown choice."""
    _choice(self.select, "collect.select", ("standard", "balanced"))
    _require(self.samples > 0, "collect.samples", "must be positive")
    _require(self.temperature >= 0, "collect.temperature", "is not negative")
    _require(0 < self.top_p <= 1, "collect.top_p", "lies in (0, 1]")


@dataclasses.dataclass(unsafe_hash=True)
class TrainConfig(StageConfig):
  """OREO (paper A.3) and the baselines on the same trajectories."""

  objective: str = "oreo"  # oreo | value | rejection | dpo | kto | dqo
  granularity: str = "token"  # token | step | response: what one action is
  beta: float = 0.03  # strength of the KL in the soft Bellman equation
  alpha: float = 0.01  # weight of the KL regulariser
  critic_lr: float = 5e-6  # peak learning rate of the value network
  # Of its head; 0: critic_lr. A step of Adam moves V by up to the rate times
  # the sum of |hidden|, hundreds in a pre-trained model.
  value_head_lr: float = 0.0
  kl: str = "reverse"  # reverse | forward (exact, whole vocabulary) | k3
  kl_target: float = 0.0  # > 0: alpha is learned to hold this KL
  alpha_lr: float = 1e-2  # Adam rate of log(alpha) when it is learned
  reduction: str = "sequence"  # sequence | token mean
  critic_warmup: float = 0.0  # fraction of the steps with the policy frozen
  clip_log: float = 0.0  # > 0: clip of D_t in the value loss
  importance_weights: bool = False  # min(exp(D_0), e) on both losses
  ema_decay: float = 0.0  # > 0: an EMA policy supplies D_t to the value loss
  hinge: float = 0.0  # response-level hinge on positive rows
  single_step: bool = False  # one-step residual instead of the telescoped
  reward_scale: float = 1.0  # reward * scale + offset
  reward_offset: float = 0.0
  dqo_lambda: float = 1.0  # DQO: lambda of the return; 1 = Monte Carlo
  dpo_variant: str = "sigmoid"  # sigmoid | ipo
  label_smoothing: float = 0.0  # DPO: probability of a flipped label (cDPO)
  pairs: int = 6  # DPO: pairs a problem at most
  desirable_weight: float = 1.0  # KTO
  undesirable_weight: float = 1.0  # KTO

  def validate(self, section: str = "train") -> None:
    """Raises ConfigError on an unknown choice or a bad number."""
    super().validate(section)
    _choice(self.objective, "train.objective", OBJECTIVES)
    _choice(self.granularity, "train.granularity", GRANULARITIES)
    _choice(self.kl, "train.kl", ("reverse", "forward", "k3"))
    _choice(self.reduction, "train.reduction", ("sequence", "token"))
    _choice(self.dpo_variant, "train.dpo_variant", ("sigmoid", "ipo"))
    _require(self.beta > 0, "train.beta", "must be positive")
    _require(self.alpha >= 0, "train.alpha", "must not be negative")
    _require(
      self.value_head_lr >= 0, "train.value_head_lr", "must not be negative"
    )
    _require(
      0 <= self.critic_warmup < 1,
      "train.critic_warmup",
      "lies in [0, 1); for a critic alone there is train.objective=value",
    )


@dataclasses.dataclass(unsafe_hash=True)
class CriticConfig:
  """The value network."""

  kind: str = "separate"  # separate | lora | shared trunk with the policy

  def validate(self) -> None:
    """Raises ConfigError on an unknown kind."""
    _choice(self.kind, "critic.kind", ("separate", "lora", "shared"))


@dataclasses.dataclass(unsafe_hash=True)
class LoraConfig:
  """Low-rank adapters (critic.kind=lora, or the policy with `policy`)."""

  policy: bool = False  # train adapters of the policy, not its weights
  rank: int = 64  # r
  alpha: float = 64.0  # updates are scaled by alpha / rank
  targets: tuple = ("q", "k", "v", "o", "gate", "up", "down")
  # Adapt the last n layers; 0: all. Those below need no backward pass and keep
  # no activations for one.
  last_layers: int = 0

  def validate(self) -> None:
    """Raises ConfigError on an empty adapter or unknown target."""
    _require(self.rank > 0, "lora.rank", "must be positive")
    _require(self.last_layers >= 0, "lora.last_layers", "must not be negative")
    for target in self.targets:
      _choice(
        target, "lora.targets", ("q", "k", "v", "o", "gate", "up", "down")
      )


@dataclasses.dataclass(unsafe_hash=True)
class EvaluateConfig:
  """Accuracy on held-out problems, and what the value adds."""

  problems: int = 1000  # held-out problems; 0: all of the split
  split: str = "test"  # validation | test
  budgets: tuple = (1, 3, 7)  # N of best-of-N and votes, B of the beam
  max_new_tokens: int = 48  # of an answer
  max_steps: int = 20  # steps of the beam search (the official code's)
  max_step_tokens: int = 16  # tokens of one proposed step
  temperature: float = 1.0  # of samples and proposals
  top_p: float = 1.0  # of samples and proposals; 1: off
  value_samples: int = 16  # samples a problem for the value analysis
  value_problems: int = 250  # problems of the value analysis
  batch_size: int = 512  # sequences decoded together
  seed: int = 0  # of samples and proposals

  def validate(self) -> None:
    """Raises ConfigError on an unknown choice."""
    _choice(self.split, "evaluate.split", ("validation", "test"))


@dataclasses.dataclass(unsafe_hash=True)
class MethodConfig:
  """A row of the table of `oreo compare`: what a method has of its own.

  All else is `config.train`'s. The defaults of `CompareConfig` are the paper's
  (arXiv 2412.16145, A.3) unless the comment says otherwise.
  """

  objective: str = "oreo"  # as train.objective
  granularity: str = "token"  # as train.granularity
  beta: float = 0.03  # as train.beta
  alpha: float = 0.01  # as train.alpha
  epochs: float = 0.0  # passes over the method's data; 0: train.epochs
  # Multiples of train.lr, tried on validation problems with the first seed.
  lr_scales: tuple = (0.3, 1.0, 3.0)

  def validate(self, section: str) -> None:
    """Raises ConfigError naming flags below `section`."""
    trained = tuple(name for name in OBJECTIVES if name != "value")
    _choice(self.objective, f"{section}.objective", trained)
    _choice(self.granularity, f"{section}.granularity", GRANULARITIES)
    _require(self.beta > 0, f"{section}.beta", "must be positive")
    _require(self.alpha >= 0, f"{section}.alpha", "must not be negative")
    _require(
      bool(self.lr_scales) and all(s > 0 for s in self.lr_scales),
      f"{section}.lr_scales",
      "must hold at least one positive number",
    )


METHODS = (
  "rejection",
  "dpo",
  "kto",
  "dqo",
  "oreo_token",
  "oreo_step",
  "oreo_response",
)


@dataclasses.dataclass(unsafe_hash=True)
class CompareConfig:
  """All methods on the same trajectories, several seeds (`oreo compare`)."""

  seeds: int = 3  # each with its own SFT policy and trajectories
  methods: tuple = METHODS  # besides SFT, where all of them start
  # Of collect.problems, how many are sampled (maze: about an hour on two CPU
  # cores).
  share: float = 0.3
  validation_problems: int = 500  # for the choice of a learning rate
  rounds: int = 3  # of the plot of iterations (paper's figure 2); 1: none
  round_methods: tuple = ("oreo_token", "rejection")  # drawn in that plot
  round_seeds: int = 1  # seeds that go through the rounds

  # The methods. The grids reach from where the paper's rates lie relative to
  # OREO's, and further down where a small model came apart (maze: KTO from a
  # tenth of OREO's rate on, DQO from OREO's own).
  rejection: MethodConfig = dataclasses.field(
    # Paper: the rate of OREO. Neither beta nor alpha is read.
    default_factory=lambda: MethodConfig("rejection")
  )
  dpo: MethodConfig = dataclasses.field(
    # Paper: beta 0.1 and a tenth of OREO's rate.
    default_factory=lambda: MethodConfig(
      "dpo", beta=0.1, alpha=0.0, lr_scales=(0.01, 0.03, 0.1, 0.3)
    )
  )
  kto: MethodConfig = dataclasses.field(
    # Paper: a hundredth of OREO's rate; beta 0.1 is KTO's own default.
    default_factory=lambda: MethodConfig(
      "kto", beta=0.1, alpha=0.0, lr_scales=(0.01, 0.03, 0.1, 0.3, 1.0)
    )
  )
  dqo: MethodConfig = dataclasses.field(
    # Paper: OREO's beta. DQO has no KL term beside that of beta.
    default_factory=lambda: MethodConfig(
      "dqo", alpha=0.0, lr_scales=(0.1, 0.3, 1.0, 3.0)
    )
  )
  oreo_token: MethodConfig = dataclasses.field(
    # Paper: beta 0.03, alpha 0.01.
    default_factory=lambda: MethodConfig("oreo")
  )
  oreo_step: MethodConfig = dataclasses.field(
    # Paper: alpha ten times the token level's.
    default_factory=lambda: MethodConfig("oreo", "step", alpha=0.1)
  )
  oreo_response: MethodConfig = dataclasses.field(
    # Paper: alpha thirty times the token level's.
    default_factory=lambda: MethodConfig("oreo", "response", alpha=0.3)
  )

  def validate(self) -> None:
    """Raises ConfigError on an unknown method or an impossible number."""
    _require(self.seeds > 0, "compare.seeds", "must be positive")
    _require(self.rounds > 0, "compare.rounds", "must be positive")
    _require(0 < self.share <= 1, "compare.share", "lies in (0, 1]")
    _require(
      0 <= self.round_seeds <= self.seeds,
      "compare.round_seeds",
      f"lies between 0 and compare.seeds={self.seeds}",
    )
    for name in self.methods:
      _choice(name, "compare.methods", METHODS)
    for name in self.round_methods:
      _choice(name, "compare.round_methods", METHODS)
    for name in METHODS:
      getattr(self, name).validate(f"compare.{name}")


def _section(kind):
  return dataclasses.field(default_factory=kind)


@dataclasses.dataclass(unsafe_hash=True)
class Config:
  """A run, whole: what `get_config(variant)` of a file in configs/ returns."""

  seed: int = 0  # of the initial weights; stages have seeds of their own
  init: str = ""  # a checkpoint directory to start from; empty: random weights
  baselines: tuple = ("rejection",)  # objectives that `run` trains besides
  rounds: int = 1  # collect-and-train rounds of `iterate`
  round_critic: str = "fresh"  # fresh: from the round's reference | continue
  round_problems: str = "same"  # same | fresh: the next collect.problems ones
  model: ModelConfig = _section(ModelConfig)
  critic: CriticConfig = _section(CriticConfig)
  lora: LoraConfig = _section(LoraConfig)
  mesh: MeshConfig = _section(MeshConfig)
  task: TaskConfig = _section(TaskConfig)
  data: DataConfig = _section(DataConfig)
  sft: SftConfig = _section(SftConfig)
  collect: CollectConfig = _section(CollectConfig)
  train: TrainConfig = _section(TrainConfig)
  evaluate: EvaluateConfig = _section(EvaluateConfig)
  compare: CompareConfig = _section(CompareConfig)

  def validate(self) -> None:
    """Raises ConfigError; every message names the flag that mends it."""
    _require(self.rounds > 0, "rounds", "must be positive")
    _choice(self.round_critic, "round_critic", ("fresh", "continue"))
    _choice(self.round_problems, "round_problems", ("same", "fresh"))
    for objective in self.baselines:
      _choice(objective, "baselines", OBJECTIVES)
    self.model.validate()
    self.critic.validate()
    self.lora.validate()
    self.data.validate()
    _require(
      self.data.tokenizer != "hf" or self.data.tokenizer_path or self.init,
      "data.tokenizer_path",
      "must name a directory when data.tokenizer=hf and init is empty",
    )
    self.sft.validate("sft")
    self.collect.validate()
    self.train.validate("train")
    self.evaluate.validate()
    self.compare.validate()


def to_dict(config: Config) -> dict[str, Any]:
  """Returns the nested dict of plain values that `from_dict` reads back."""
  return dataclasses.asdict(config)


def from_dict(values: dict[str, Any], kind: type = Config, path: str = ""):
  """Builds a config section from a nested dict.

  Args:
    values: field names to plain values or nested dicts; missing fields keep
      their defaults.
    kind: the dataclass to build.
    path: dotted path of the section, for messages.

  Returns:
    An instance of `kind`.

  Raises:
    ConfigError: on an unknown key (naming the nearest valid one) or on a
      value of the wrong type.
  """
  if not isinstance(values, dict):
    raise ConfigError(f"config.{path}: expected a section, got {values!r}")
  fields = {field.name: field.type for field in dataclasses.fields(kind)}
  built = {}
  for key, value in values.items():
    name = f"{path}.{key}" if path else key
    if key not in fields:
      raise ConfigError(unknown_key(name, field_paths(kind(), path)))
    want = fields[key]
    if dataclasses.is_dataclass(want):
      value = from_dict(value, want, name)
    elif want is float and type(value) is int:
      value = float(value)
    elif want is tuple and isinstance(value, list):
      value = tuple(value)
    if not isinstance(value, want) or (want is int and value is True):
      raise ConfigError(
        f"config.{name}: expected {want.__name__}, got {value!r}"
      )
    built[key] = value
  return kind(**built)


def field_paths(section: Any, path: str = "") -> list[str]:
  """Returns the dotted paths of all settings below `section`."""
  paths = []
  for field in dataclasses.fields(section):
    name = f"{path}.{field.name}" if path else field.name
    value = getattr(section, field.name)
    if dataclasses.is_dataclass(value):
      paths += field_paths(value, name)
    else:
      paths.append(name)
      if isinstance(value, dict):
        paths += [f"{name}.{key}" for key in value]
  return paths


def unknown_key(name: str, valid: list[str]) -> str:
  """Returns the message for a key that is not in `valid`, with the nearest."""
  section, _, last = name.rpartition(".")
  # learning_rate means lr: abbreviations are too far for a spelling match.
  short = "".join(word[:1] for word in last.split("_"))
  abbreviated = [f"{section}.{short}"] if f"{section}.{short}" in valid else []
  near = abbreviated or difflib.get_close_matches(name, valid, n=1, cutoff=0.3)
  hint = f"; did you mean config.{near[0]}?" if near else ""
  return f"config.{name} is not a setting{hint}"


def save_config(config: Config, path: str | pathlib.Path) -> None:
  """Writes the resolved config as a file that `--config` accepts again."""
  values = pprint.pformat(to_dict(config), sort_dicts=False, width=76)
  text = (
    '"""The resolved configuration of this run; give it back as --config."""\n'
    "\nfrom oreo_jax.config import from_dict\n\n\n"
    f"def get_config():\n  return from_dict(VALUES)\n\n\nVALUES = {values}\n"
  )
  files.write_text(path, text)


def _require(condition: bool, flag: str, rule: str) -> None:
  if not condition:
    raise ConfigError(f"config.{flag} {rule}: set --config.{flag}=...")


def _choice(value: Any, flag: str, choices: tuple) -> None:
  if value not in choices:
    raise ConfigError(
      f"config.{flag}={value!r} is unknown: set --config.{flag} to one of "
      + ", ".join(choices)
    )
