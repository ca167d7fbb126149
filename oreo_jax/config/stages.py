"""Settings of what there is to solve, and of the stages that work on it."""

import dataclasses
from collections.abc import Iterator

from oreo_jax.config.networks import DTYPES, REMAT
from oreo_jax.settings import (
  Rule,
  Section,
  choice,
  positive,
  section,
  setting,
)

# Adam's moments, or the layers of a reference that nothing trained stands on.
OFFLOAD = ("moments", "reference")
GRANULARITIES = ("token", "step", "turn", "response")


@dataclasses.dataclass(unsafe_hash=True)
class TaskConfig(Section):
  """What is to be solved: prompts and a verifier."""

  name: str = ""  # a name of oreo_jax.tasks; empty: trajectories only
  options: dict = dataclasses.field(default_factory=dict, hash=False)


@dataclasses.dataclass(unsafe_hash=True)
class DataConfig(Section):
  """How text becomes fixed-shape rows."""

  path: str = ""  # a file of trajectories; empty: the collect stage's
  # With --config.init, task and hf both mean the checkpoint's own.
  tokenizer: str = choice("task", "byte", "bpe", "hf")
  tokenizer_path: str = ""  # directory of a saved tokenizer (hf)
  chat: bool = False  # prompt and answer go through the chat template
  tokenizer_vocab: int = positive(2048)  # size of a BPE trained on the file
  row_length: int = setting(64, low=2)  # T, slots of a packed row
  delimiters: str = choice("lines", "sentences")  # where a step ends
  max_length: int = 0  # longest sequence in tokens; 0: row_length
  on_error: str = choice("raise", "skip")  # what a bad line does
  on_long: str = choice("raise", "skip")  # what a too long sequence does
  # Fraction of the problems that is not trained on but measured on.
  held_out: float = setting(0.1, below=1)
  seed: int = 0  # of the split by problem


@dataclasses.dataclass(unsafe_hash=True)
class StageConfig(Section):
  """What the training stages share: batches, optimiser, records."""

  batch_size: int = positive(128)  # rows of a global batch
  grad_accum: int = positive(1)  # micro-batches a step; divides batch_size
  epochs: float = positive(1.0)  # passes over the data
  updates: int = 0  # in all, with as many passes as that takes; 0: of `epochs`
  max_steps: int = 0  # 0: as many as the epochs need
  lr: float = 5e-6  # peak learning rate of the policy
  # How the rate falls after the warm-up.
  schedule: str = choice("cosine", "linear", "constant")
  # Fraction of the steps in which the rate rises.
  warmup: float = setting(0.03, high=1)
  # The rate at the end, as a fraction of the peak.
  final_lr: float = setting(0.0, high=1)
  b1: float = setting(0.9, below=1)  # AdamW
  b2: float = setting(0.95, below=1)  # AdamW
  eps: float = positive(1e-8)  # AdamW
  # Dtype of AdamW's first moment. The second stays float32: see docs/memory.md.
  moment_dtype: str = choice(*DTYPES)
  weight_decay: float = 0.0  # decoupled, on matrices only
  clip_norm: float = 1.0  # global norm of the gradients; 0: off
  log_every: int = positive(10)  # steps between rows of metrics.jsonl
  measure_every: int = 100  # steps between looks at held-out problems; 0: end
  checkpoint_every: int = 500  # steps between checkpoints; 0: only the last
  keep_checkpoints: int = 2  # newest kept; 0: all
  # What waits in the memory of the host while a step does not need it.
  offload: tuple = setting((), entry=str, choices=OFFLOAD)
  loss_chunk: int = positive(512)  # positions of a chunk of the output head
  loss_vocab_chunk: int = positive(8192)  # columns of a chunk of it
  # Logits of a micro-batch and device, up to which they wait for the backward
  # pass (4 bytes each, as many of the reference); more are computed again.
  loss_keep: int = 2**26
  # First and last step of a profiler trace, counted from 1; empty: none.
  profile: tuple = setting((), entry=int, above=0)
  seed: int = 0  # of the order of the data

  def rules(self) -> Iterator[Rule]:
    """Yields what must divide what."""
    yield Rule(
      self.measure_every % self.log_every == 0,
      "measure_every",
      f"a multiple of log_every={self.log_every}",
    )
    yield Rule(
      self.batch_size % self.grad_accum == 0,
      "grad_accum",
      f"a divisor of batch_size={self.batch_size}",
    )
    yield Rule(
      len(self.profile) in (0, 2)
      and list(self.profile) == sorted(self.profile),
      "profile",
      "the first and the last step of a trace, as in --profile=10:13",
    )


@dataclasses.dataclass(unsafe_hash=True)
class SftConfig(StageConfig):
  """Supervised fine-tuning on the task's demonstrations."""

  examples: int = 0  # demonstrations used; 0: all
  on_prompts: bool = False  # learn to predict prompts too, as pre-training does


@dataclasses.dataclass(unsafe_hash=True)
class CollectConfig(Section):
  """Sampling trajectories from the current policy (paper A.2)."""

  problems: int = 0  # training problems sampled; 0: all
  skip: int = 0  # training problems left out before those, e.g. SFT's
  samples: int = positive(10)  # responses a problem
  # Which responses stay: all, or about as many right as wrong of a problem.
  select: str = choice("standard", "balanced")
  temperature: float = 1.0  # of the sampler; 0: the likeliest token
  top_k: int = 0  # 0: off
  top_p: float = setting(1.0, above=0, high=1)  # 1: off
  # Tokens stay that have this fraction of the likeliest one's probability.
  min_p: float = setting(0.0, high=1)
  # Makes tokens less likely that prompt or answer hold already; 1: off.
  repetition_penalty: float = positive(1.0)
  max_new_tokens: int = positive(48)  # longer responses are truncated, reward 0
  batch_size: int = positive(512)  # sequences decoded together
  seed: int = 0  # of the sampler


@dataclasses.dataclass(unsafe_hash=True)
class TrainConfig(StageConfig):
  """OREO (paper A.3) and the baselines on the same trajectories."""

  objective: str = "oreo"  # what is trained: a name of train.OBJECTIVES
  granularity: str = choice(*GRANULARITIES)  # what one action is
  # The strength of the KL in the soft Bellman equation.
  beta: float = positive(0.03)
  alpha: float = 0.01  # weight of the KL regulariser
  critic_lr: float = 5e-6  # peak learning rate of the value network
  # Of its head; 0: critic_lr. A step of Adam moves V by up to the rate times
  # the sum of |hidden|, hundreds in a pre-trained model.
  value_head_lr: float = 0.0
  # The KL regulariser; reverse and forward are exact, over the vocabulary.
  kl: str = choice("reverse", "forward", "k3")
  kl_target: float = 0.0  # > 0: alpha is learned to hold this KL
  alpha_lr: float = 1e-2  # Adam rate of log(alpha) when it is learned
  reduction: str = choice("sequence", "token")  # what the losses average over
  # Fraction of the steps, at the start, in which the policy is frozen.
  critic_warmup: float = setting(0.0, high=1)
  clip_log: float = 0.0  # > 0: clip of D_t in the value loss
  importance_weights: bool = False  # min(exp(D_0), e) on both losses
  # > 0: a running mean of the policy supplies D_t to the value loss.
  ema_decay: float = setting(0.0, below=1)
  hinge: float = 0.0  # response-level hinge on positive rows
  single_step: bool = False  # one-step residual instead of the telescoped
  reward_scale: float = positive(1.0)  # reward * scale + offset
  reward_offset: float = setting(0.0, low=None)
  # DQO: lambda of the return; 1: Monte Carlo.
  dqo_lambda: float = setting(1.0, high=1)
  dpo_variant: str = choice("sigmoid", "ipo")  # DPO: the loss of a pair
  # DPO: the probability of a flipped label (cDPO).
  label_smoothing: float = setting(0.0, below=0.5)
  # When the reference is run: in every step, or once, before the first one,
  # over all sequences. Of a stored one there are the log-probabilities of the
  # tokens alone, so that the KL is kl=k3, and a step holds no reference.
  reference: str = choice("online", "stored")
  # Dtype in which a step holds the frozen policy, which is the reference and
  # the base below adapters. The networks that are trained start from the policy
  # as it is.
  reference_dtype: str = choice("param_dtype", "bfloat16")
  # Keep on disk what the layers below lora.last_layers say of every sequence,
  # so that a step runs the last layers only: tokens x embed_dim x 2 bytes. The
  # states are bfloat16; with model.dtype=float32 that moves log-probabilities
  # and values a little, about as much as computing in bfloat16 would.
  keep_trunk: bool = False
  pairs: int = positive(6)  # DPO: pairs a problem at most
  desirable_weight: float = 1.0  # KTO
  undesirable_weight: float = 1.0  # KTO

  def rules(self) -> Iterator[Rule]:
    """Yields what settings of the losses must be because of each other."""
    yield from super().rules()
    yield Rule(
      self.critic_warmup < 1,
      "critic_warmup",
      "less than 1 (for a critic alone there is train.objective=value)",
    )
    yield Rule(
      self.critic_lr > 0 or not self.value_head_lr,
      "critic_lr",
      f"a positive rate beside value_head_lr={self.value_head_lr}, which is a "
      "multiple of it",
    )
    yield Rule(
      self.reference == "online" or self.kl == "k3",
      "kl",
      "k3, since of a reference that is stored (train.reference=stored) there "
      "are the log-probabilities of the tokens alone",
    )
    learns_alpha = self.objective == "oreo" and self.kl_target > 0
    yield Rule(
      self.alpha > 0 or not learns_alpha,
      "alpha",
      f"a positive weight to start from with kl_target={self.kl_target}",
    )


@dataclasses.dataclass(unsafe_hash=True)
class EvaluateConfig(Section):
  """Accuracy on held-out problems, and what the value adds."""

  problems: int = 1000  # held-out problems; 0: all of the split
  split: str = choice("test", "validation")
  # N of best-of-N and votes, B of the beam.
  budgets: tuple = setting((1, 3, 7), entry=int, above=0, nonempty=True)
  max_new_tokens: int = positive(48)  # of an answer
  max_steps: int = positive(20)  # steps of the beam search (official code)
  max_step_tokens: int = positive(16)  # tokens of one proposed step
  # Of samples and proposals, as in collect.
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = setting(1.0, above=0, high=1)
  min_p: float = setting(0.0, high=1)
  value_samples: int = positive(16)  # samples a problem for the value analysis
  value_problems: int = 250  # problems of the value analysis
  batch_size: int = positive(512)  # sequences decoded together
  seed: int = 0  # of samples and proposals


@dataclasses.dataclass(unsafe_hash=True)
class GenerateConfig(Section):
  """Answering one prompt from the shell (`oreo generate`)."""

  prompt: str = ""  # what to answer; --prompt is short for it
  value: str = ""  # a Hugging Face directory of a value network; --value
  # How to answer; all but the samples are guided by a value network. --strategy
  strategy: str = choice(
    "sample", "beam", "best_of_n", "best_of_k", "lookahead"
  )
  samples: int = positive(1)  # answers of the strategy sample
  budget: int = positive(4)  # B of the beam, N and K of the best, breadth
  depth: int = positive(2)  # steps that lookahead looks ahead
  search_temperature: float = 1.0  # of what a search proposes
  max_new_tokens: int = positive(256)  # of an answer
  stop: tuple = setting((), entry=str)  # strings that end an answer
  # As in collect; 0 is greedy.
  temperature: float = 0.0
  top_k: int = 0
  top_p: float = setting(1.0, above=0, high=1)
  min_p: float = setting(0.0, high=1)
  repetition_penalty: float = positive(1.0)
  seed: int = 0  # of the draws


@dataclasses.dataclass(unsafe_hash=True)
class MethodConfig(Section):
  """What a method of `oreo compare`, a baseline of `oreo run`, has of its own.

  All else is `config.train`'s. What is left open here is as the method's row in
  `train.METHODS` says: by default the paper's settings (arXiv 2412.16145, A.3).
  """

  beta: float = 0.0  # as train.beta; 0: the row's
  alpha: float = setting(-1.0, low=-1)  # as train.alpha; -1: the row's
  # Passes over the method's data; 0: as many updates as train.objective makes.
  epochs: float = 0.0
  lr_scale: float = 0.0  # rate in `oreo run`, times train.lr; 0: the row's
  # `oreo compare`: multiples of train.lr that are tried on validation problems
  # with the first seed; empty: the row's.
  lr_scales: tuple = setting((), entry=float, above=0)

  def rules(self) -> Iterator[Rule]:
    """Yields that an alpha which is given is one."""
    yield Rule(
      self.alpha == -1 or self.alpha >= 0,
      "alpha",
      "at least 0, or -1 for unset",
    )


@dataclasses.dataclass(unsafe_hash=True)
class CompareConfig(Section):
  """All methods on the same trajectories, several seeds (`oreo compare`)."""

  seeds: int = positive(3)  # each with its own SFT policy and trajectories
  # Of train.METHODS, besides SFT, where all of them start; empty: all.
  methods: tuple = setting((), entry=str)
  # Of collect.problems, how many are sampled (maze: about an hour on two CPU
  # cores).
  share: float = setting(0.3, above=0, high=1)
  validation_problems: int = positive(500)  # for the choice of a learning rate
  rounds: int = positive(3)  # of the plot of rounds (paper's figure 2); 1: none
  # Drawn in that plot.
  round_methods: tuple = setting(("oreo_token", "rejection"), entry=str)
  round_seeds: int = 1  # seeds that go through the rounds

  rejection: MethodConfig = section(MethodConfig)
  dpo: MethodConfig = section(MethodConfig)
  kto: MethodConfig = section(MethodConfig)
  dqo: MethodConfig = section(MethodConfig)
  oreo_token: MethodConfig = section(MethodConfig)
  oreo_step: MethodConfig = section(MethodConfig)
  oreo_response: MethodConfig = section(MethodConfig)

  def rules(self) -> Iterator[Rule]:
    """Yields how many seeds may go through the rounds."""
    yield Rule(
      self.round_seeds <= self.seeds,
      "round_seeds",
      f"at most compare.seeds={self.seeds}",
    )


@dataclasses.dataclass(unsafe_hash=True)
class AotConfig(Section):
  """Compiling for a machine that is not there (`oreo aot`)."""

  topology: str = ""  # KIND:SHAPE, as v5e:4x4; cpu:8 is simulated devices
  num_slices: int = positive(1)  # of this shape, each with a network of its own
  what: str = choice("train", "decode", "search")  # the program
  # Whose peaks to measure by (of oreo_jax.chips); empty: the topology's.
  chip: str = ""
  hbm_gib: float = 0.0  # memory of a chip in GiB; 0: what the chip has
  jobs: int = 0  # compilations side by side; 0: as many as half of the cores
  search: bool = False  # try the layouts that follow, each with each
  tensor: tuple = setting((1, 2, 4), entry=int, above=0, nonempty=True)
  data: tuple = setting((1,), entry=int, above=0, nonempty=True)
  grad_accum: tuple = setting((1, 2, 4), entry=int, above=0, nonempty=True)
  remat: tuple = setting(
    ("full", "dots"), entry=str, choices=REMAT, nonempty=True
  )
  # As model.attention_block; 0: what suits the machine.
  attention_block: tuple = setting((0,), entry=int, nonempty=True)

  def rules(self) -> Iterator[Rule]:
    """Yields that the layouts of a search are those of training."""
    yield Rule(
      not self.search or self.what == "train",
      "what",
      "train, since search=True tries layouts of the training step",
    )
