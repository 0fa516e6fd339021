"""All settings of all jobs: one tree of dataclasses, read from a recipe and the command line, checked at the door."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from models.config import PRESETS, ModelConfig, OptimizerConfig, ScheduleConfig
from models.mesh import Parallelism
from models.training.spikes import SpikeConfig
from pipelines.curation import CurationSettings
from pipelines.tokenize import TokenizeSettings
from pipelines.tokenizer import TokenizerSettings


class SettingsError(ValueError):
    """Something that whoever started the job has to put right; the message is all they need to see."""


class FailedError(RuntimeError):
    """A job did what it could, and something of it failed; the message is all that whoever started it needs to see."""


def require(condition: bool, setting: str, value: object, allowed: str) -> None:
    """Raise SettingsError naming the setting, its value and what is allowed, unless the condition holds."""
    if not condition:
        raise SettingsError(f"{setting} is {value!r}; it has to be {allowed}")


def part_of(settings: Any, kind: type) -> Any:
    """The fields of a job's settings that belong to ``kind``, one of the classes it extends."""
    return kind(**{f.name: getattr(settings, f.name) for f in dataclasses.fields(kind)})


@dataclass
class InWorkspace:
    """What every job shares."""

    workspace: str = "workspace"
    """Folder or URI (s3://, gs://) that holds everything of a project."""


@dataclass
class OfRun(InWorkspace):
    """What jobs that use a trained model share."""

    name: str = "base"
    """The pretraining run to take."""
    step: int | None = None
    """Checkpoint to take; null takes the newest usable one."""
    model: str | None = None
    """A model in Llama format instead of a run: a folder, such as an export, or a hub's repository (OWNER/NAME, or
    OWNER/NAME@REVISION)."""


@dataclass
class Placed(OfRun):
    """What jobs share that run on one node, in a job on a cluster as a task of their own."""

    device: Literal["auto", "cpu", "gpu"] = "auto"
    """auto: a GPU when there is one. Say gpu on a cluster whose GPU nodes scale up from zero."""
    cpus: float = 1.0
    """CPU cores that are reserved for it on a cluster."""

    def validate(self) -> None:
        """Raise SettingsError for what cannot work, before anything is loaded."""
        require(self.cpus > 0, "cpus", self.cpus, "above 0")


@dataclass
class CurateJob(CurationSettings, InWorkspace):
    """Read, filter and deduplicate documents."""


@dataclass
class TokenizerChoice(TokenizerSettings):
    """Train a tokenizer, or take one that is there."""

    from_model: str | None = None
    """Take the tokenizer of a model in Hugging Face's format instead of training one: a folder, or a hub's repository
    (OWNER/NAME, or OWNER/NAME@REVISION). `--from` for short."""


@dataclass
class TokenizerJob(TokenizerChoice, InWorkspace):
    """Train a byte-level BPE tokenizer on the curated corpus, or take a model's."""


@dataclass
class TokenizeJob(TokenizeSettings, InWorkspace):
    """Turn the curated corpus into packed token shards."""


@dataclass
class ModelSettings:
    """A preset's shape, and what to change of it; null keeps the preset's value."""

    preset: Literal["nano", "124m", "350m", "1b", "3b", "8b"] = "nano"
    """Shape to start from."""
    vocab_size: int | None = None
    """Rows of the embedding; null takes the tokenizer's size rounded up to a multiple of 64."""
    d_model: int | None = None
    """Width of the residual stream."""
    n_layers: int | None = None
    """Number of blocks."""
    n_heads: int | None = None
    """Query heads."""
    n_kv_heads: int | None = None
    """Key and value heads: n_heads for MHA, fewer for GQA, 1 for MQA."""
    d_ff: int | None = None
    """Width of the feed-forward layer."""
    rope_theta: float | None = None
    """Base of the rotary frequencies."""
    qk_norm: bool | None = None
    """Normalize queries and keys per head."""
    tied_embeddings: bool | None = None
    """One matrix for input and output embedding."""
    base_width: int | None = None
    """d_model at which the learning rate was tuned: it then serves this width too (muP)."""

    def config(self, vocab_size: int, sequence_length: int | None = None) -> ModelConfig:
        """The full shape for a tokenizer of ``vocab_size`` tokens.

        Raises:
            SettingsError: the shape cannot work.
        """
        changes = {k: v for k, v in dataclasses.asdict(self).items() if v is not None and k != "preset"}
        changes.setdefault("vocab_size", 64 * math.ceil(vocab_size / 64))
        require(
            changes["vocab_size"] >= vocab_size,
            "model.vocab_size",
            changes["vocab_size"],
            f"at least the tokenizer's {vocab_size}",
        )
        if sequence_length is not None:
            changes["max_seq_len"] = sequence_length
        config = dataclasses.replace(PRESETS[self.preset], **changes)
        checked(config)
        return config


@dataclass
class Faults:
    """Rehearse failures: what the run should survive is done to it."""

    kill_worker_at_step: int | None = None
    """The last worker kills itself with SIGKILL before this step, once."""
    slow_worker_seconds: float = 0.0
    """The last worker is late by this much in every step."""
    poison_data_steps: tuple[int, int] | None = None
    """Batches of the data steps from the first number up to the second are replaced: by their own tokens shuffled, by
    one token repeated, by random tokens, in turn."""
    poison_lr_factor: float = 1.0
    """Factor of the learning rate in the poisoned steps."""


@dataclass
class Scoring:
    """Which tasks of lm_eval to score a model on, and how."""

    tasks: list[str] | str = field(default_factory=list)
    """Tasks or groups of the harness by name, such as `mmlu,gsm8k,gsm8k_cot,humaneval`, or YAML files of own ones."""
    data_dir: str | None = None
    """Folder with the data of mmlu (`mmlu/{dev,test}/SUBJECT_{dev,test}.csv`, with the columns question, choice0 to
    choice3, and answer, 0 to 3), gsm8k (`gsm8k/{train,test}.jsonl`) and humaneval (`humaneval/HumanEval.jsonl.gz`);
    null takes the hub's, as other tasks do."""
    num_fewshot: dict[str, int] | int | None = None
    """Solved examples before each question, of all tasks or by their names, such as `{mmlu: 5, gsm8k: 8}`; null takes
    the task's own number: of mmlu none, where papers have 5. Tasks that allow none stay without."""
    limit: int | None = None
    """Questions of each task; null takes all."""
    max_gen_toks: int | None = None
    """Tokens of a text at most, where tasks have texts written; null takes the task's own number, of gsm8k 256. The
    model's context has to have room for more than that."""
    allow_code_execution: bool = False
    """Run the programs that the model writes, in a sandbox: what humaneval and mbpp need."""
    samples_per_problem: int | None = None
    """Programs drawn for each problem; null takes the task's number, for humaneval a single greedy one."""
    pass_at_k: list[int] | None = None
    """Numbers of programs that may be tried, of which one has to pass; null takes the task's."""
    temperature: float = 0.2
    """Of the programs, with `samples_per_problem` above 1: how freely they are drawn; near 0 the likeliest tokens."""
    top_p: float = 0.95
    """Likewise: each token is drawn from the likeliest that together have this probability."""

    def task_names(self) -> list[str]:
        """``tasks`` as a list."""
        names = self.tasks.split(",") if isinstance(self.tasks, str) else self.tasks
        return [name for name in map(str.strip, names) if name]

    def shots(self, task: str) -> int | None:
        """``num_fewshot`` of a task."""
        return self.num_fewshot.get(task) if isinstance(self.num_fewshot, dict) else self.num_fewshot

    def validate(self) -> None:
        """Raise SettingsError for what cannot work, before anything is loaded."""
        shots = self.num_fewshot.values() if isinstance(self.num_fewshot, dict) else [self.num_fewshot or 0]
        require(min(shots, default=0) >= 0, "num_fewshot", self.num_fewshot, "at least 0")
        named = self.num_fewshot if isinstance(self.num_fewshot, dict) else {}
        known = not self.task_names() or named.keys() <= set(self.task_names())
        require(known, "num_fewshot", self.num_fewshot, "of names that are in tasks")
        require(self.limit is None or self.limit >= 1, "limit", self.limit, "at least 1, or null for all")
        most = self.max_gen_toks
        require(most is None or most >= 1, "max_gen_toks", most, "at least 1, or null for the task's own")
        samples, ks = self.samples_per_problem, self.pass_at_k
        require(samples is None or samples >= 1, "samples_per_problem", samples, "at least 1, or null")
        fits = ks is None or (bool(ks) and min(ks) >= 1 and max(ks) <= (samples or max(ks)))
        require(fits, "pass_at_k", ks, "numbers from 1 to samples_per_problem")
        require(self.temperature > 0, "temperature", self.temperature, "above 0")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")


@dataclass
class ScoringBesideTraining(Scoring):
    """Scores of checkpoints while training goes on."""

    every_steps: int | None = None
    """Steps between scorings, a multiple of `checkpoint_every`; needed with tasks. The last step is scored too."""

    def validate(self) -> None:
        """Raise SettingsError for what cannot work, before anything is started."""
        super().validate()
        needed = not self.task_names() or (self.every_steps or 0) >= 1
        require(needed, "every_steps", self.every_steps, "at least 1 with tasks")


@dataclass
class PretrainJob(InWorkspace):
    """Pretrain a transformer on token shards with Ray Train, recovering by itself."""

    name: str = "base"
    """Name of the run; the same name goes on where the run was."""
    on_change: Literal["refuse", "restart"] = "refuse"
    """When the run of this name was started with other settings or tokens: refuse, or delete it and start anew."""
    model: ModelSettings = field(default_factory=ModelSettings)
    """Shape of the model."""
    init_from: str | None = None
    """Go on from a model in Llama format: a folder, such as an export, or a hub's repository (OWNER/NAME, or
    OWNER/NAME@REVISION). It gives shape and weights; its tokenizer has to be the workspace's, for which there is
    `ingot tokenizer --from`. null starts from random weights."""
    steps: int = 1000
    """Optimizer steps."""
    global_batch: int = 64
    """Sequences in a step, over all workers."""
    sequence_length: int | None = None
    """Tokens in a sequence; null takes the preset's longest."""
    microbatch: int | None = None
    """Sequences that a worker takes at a time; null takes its whole share, smaller ones accumulate gradients."""
    seed: int = 0
    """Of the initial weights and the order of the data."""
    workers: int = 1
    """Ray Train workers; above 1 the model is sharded with FSDP2, or as `parallelism` says."""
    min_workers: int | None = None
    """Fewest workers that the run goes on with when nodes are lost; it grows again, up to `workers`, when nodes join.
    Of the numbers in between, it takes those that fit `parallelism`. null always waits for all."""
    resize_every_seconds: float = 60.0
    """How often a run that may grow looks whether it can; it saves before it does."""
    start_timeout_seconds: float = 30.0
    """How long workers that start wait for their nodes until fewer are tried, down to `min_workers`."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """auto: GPUs when the cluster has one for each worker at the start. Say gpu when nodes scale up from zero."""
    cpus_per_worker: float = 1.0
    """CPU cores reserved for each worker."""
    gpus_per_worker: float = 1.0
    """GPUs reserved for each worker on GPUs: 1, or a part of one with a single worker, so that small runs share it."""
    compile: bool = False
    """Compile the model with torch.compile."""
    precision: Literal["auto", "bf16", "fp8", "fp32"] = "auto"
    """Of matrix products and activations; weights and optimizer state are fp32. auto: bf16 on GPUs, fp32 on CPUs. fp8
    (the blocks' products; Hopper GPUs and newer) is faster from some billion parameters on."""
    recompute: float = 1.0
    """Share of the memory for activations that may be used; what is not kept is computed again in the backward pass."""
    parallelism: Parallelism = field(default_factory=Parallelism)
    """What the workers divide among themselves."""
    mask_documents: bool = False
    """Keep attention within documents where several share a sequence; slower than plain causal attention."""
    z_loss: float = 0.0
    """Weight of the squared log-normalizer in the gradient (PaLM took 1e-4); keeps logits from drifting."""
    batch_ramp: list[tuple[int, int]] = field(default_factory=list)
    """Smaller batches at the start: pairs of a step and the global batch from there on, such as
    `[[0, 64], [500, 128], [1500, 256]]`; the last one is global_batch."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW or Muon."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Learning rate over the run."""
    spikes: SpikeConfig = field(default_factory=SpikeConfig)
    """When to go back."""
    checkpoint_every: int = 200
    """Steps between checkpoints."""
    keep_checkpoints: int = 3
    """Newest checkpoints that are kept, beside the newest clean one."""
    keep_every: int | None = None
    """Checkpoints of steps that this divides are kept for good."""
    keep_best: bool = False
    """Keep the checkpoint with the lowest validation loss too; validate at steps that are saved for that."""
    host_snapshots: int = 2
    """Newest checkpoints that are also remembered in each worker's host memory, 12 bytes a parameter over the workers
    that shard it: a rollback then takes seconds. 0 has training wait for every checkpoint."""
    profile: tuple[int, int] | None = None
    """Record the steps from the first number up to the second and write a trace into the run's folder."""
    clean_after: int = 100
    """Steps without a spike after which a checkpoint counts as clean."""
    validate_every: int = 200
    """Steps between validations."""
    validation_samples: int = 256
    """Sequences of the validation split that are measured each time, evenly from all of it."""
    validation: Literal["within", "beside"] = "within"
    """within: the workers stop training to validate. beside: a task of its own measures checkpoints, on one CPU core
    and `validation_gpus`, while training goes on; without a free core it waits until training ends."""
    validation_gpus: float = 0.0
    """GPUs of a validation beside training, and of `evaluate`."""
    evaluate: ScoringBesideTraining = field(default_factory=ScoringBesideTraining)
    """Tasks to score checkpoints on, such as `{tasks: mmlu, every_steps: 1000, limit: 50}`, in a task beside training
    on one CPU core and `validation_gpus`; what fails there is told and costs the run nothing."""
    max_failures: int = 3
    """Restarts of the workers after a crash before the job gives up; -1 for no limit."""
    max_preemptions: int = -1
    """Restarts of the workers after nodes that announced their end; -1 for no limit."""
    track: list[Literal["wandb", "mlflow"]] = field(default_factory=list)
    """Where to track the run beside its own files, TensorBoard and Ray's metrics; has to be installed."""
    report_every: float = 30.0
    """Seconds between two drawings of the run's page, report.html, while it trains; 0 leaves that to `ingot report`."""
    faults: Faults = field(default_factory=Faults)
    """Failures to rehearse."""

    def validate(self) -> None:
        """Raise SettingsError for what cannot work, before anything is started."""
        for name in ("steps", "global_batch", "workers", "checkpoint_every", "keep_checkpoints", "clean_after"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("validate_every", "validation_samples"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("max_failures", "max_preemptions"):
            require(getattr(self, name) >= -1, name, getattr(self, name), "at least 0, or -1 for no limit")
        for name in ("resize_every_seconds", "start_timeout_seconds"):
            require(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        require(
            self.min_workers is None or 1 <= self.min_workers <= self.workers,
            "min_workers",
            self.min_workers,
            f"null, or from 1 to workers, {self.workers}",
        )
        require(self.report_every >= 0, "report_every", self.report_every, "at least 0")
        whole = self.gpus_per_worker == 1 or (0 < self.gpus_per_worker < 1 and self.workers == 1)
        require(whole, "gpus_per_worker", self.gpus_per_worker, "1, or with one worker also between 0 and 1")
        best = self.keep_best and self.validation == "beside"
        require(not best, "keep_best", self.keep_best, "false with validation beside training, whose losses come late")
        require(self.validation_gpus >= 0, "validation_gpus", self.validation_gpus, "at least 0")
        require(
            self.validation == "within" or self.validate_every % self.checkpoint_every == 0,
            "validate_every",
            self.validate_every,
            f"a multiple of checkpoint_every, {self.checkpoint_every}, whose checkpoints are measured beside training",
        )
        every = self.evaluate.every_steps
        saved = not self.evaluate.task_names() or every is None or every % self.checkpoint_every == 0
        require(saved, "evaluate.every_steps", every, f"a multiple of checkpoint_every, {self.checkpoint_every}")
        require(bool(self.name) and "/" not in self.name, "name", self.name, "a folder's name without a slash")
        require(self.microbatch is None or self.microbatch >= 1, "microbatch", self.microbatch, "at least 1, or null")
        require(
            self.schedule.warmup_steps <= self.steps,
            "schedule.warmup_steps",
            self.schedule.warmup_steps,
            f"at most steps, {self.steps}",
        )
        longest = PRESETS[self.model.preset].max_seq_len
        require(
            self.sequence_length is None or self.sequence_length >= 2,
            "sequence_length",
            self.sequence_length,
            "at least 2",
        )
        slow = self.faults.slow_worker_seconds
        require(slow >= 0, "faults.slow_worker_seconds", slow, "at least 0")
        poison = self.faults.poison_data_steps
        require(
            poison is None or 0 <= poison[0] < poison[1],
            "faults.poison_data_steps",
            poison,
            "a range such as [200, 206]",
        )
        require(0 <= self.recompute <= 1, "recompute", self.recompute, "from 0 to 1")
        require(self.z_loss >= 0, "z_loss", self.z_loss, "at least 0")
        require(self.host_snapshots >= 0, "host_snapshots", self.host_snapshots, "at least 0")
        require(self.keep_every is None or self.keep_every >= 1, "keep_every", self.keep_every, "at least 1, or null")
        traced = self.profile
        require(traced is None or 0 <= traced[0] < traced[1], "profile", traced, "a range such as [20, 23]")
        starts, sizes = [step for step, _ in self.batch_ramp], [size for _, size in self.batch_ramp]
        require(
            not starts or ((starts[0] == 0 and sorted(set(starts)) == starts and min(sizes) >= 1)
            and sizes[-1] == self.global_batch),
            "batch_ramp",
            self.batch_ramp,
            f"pairs of rising steps from 0 on and sizes, of which the last is global_batch, {self.global_batch}",
        )  # fmt: skip
        split = self.parallelism.context_parallel > 1
        require(not (split and self.mask_documents), "mask_documents", True, "false with context_parallel above 1")
        fp8 = self.precision == "fp8" and self.parallelism.tensor_parallel > 1
        require(not fp8, "precision", self.precision, "bf16 or fp32 with tensor_parallel above 1")
        if self.init_from is None:
            self.check_parallelism(self.model.config(256, self.sequence_length or longest))
            return
        own = self.model == ModelSettings()
        require(own, "model", self.model, "left as it is with init_from, which gives the shape")
        given = self.sequence_length is not None
        require(given, "sequence_length", None, "given with init_from: its model may know longer ones than are needed")

    def check_parallelism(self, config: ModelConfig) -> None:
        """Raise SettingsError unless a model of this shape can be laid out over the workers."""
        for workers in {self.workers, self.fewest_workers()}:
            try:
                self.parallelism.check(workers, config, self.length())
            except ValueError as error:
                raise SettingsError(str(error)) from None

    def measures_beside(self) -> bool:
        """Whether checkpoints are measured by a task of its own beside training."""
        return self.validation == "beside" or bool(self.evaluate.task_names())

    def losses_due(self, step: int) -> bool:
        """Whether the validation loss of a step's checkpoint is measured beside training."""
        return self.validation == "beside" and (step % self.validate_every == 0 or step == self.steps)

    def scores_due(self, step: int) -> bool:
        """Whether a step's checkpoint is scored on tasks, beside training."""
        every = self.evaluate.every_steps
        return bool(self.evaluate.task_names()) and every is not None and (step % every == 0 or step == self.steps)

    def data_batch(self) -> int:
        """Sequences in a data step, the unit in which data is counted: what all sizes of the batch are multiples of."""
        return math.gcd(self.global_batch, *(size for _, size in self.batch_ramp))

    def ramp(self) -> list[tuple[int, int]]:
        """``batch_ramp`` in data steps."""
        return [(step, size // self.data_batch()) for step, size in self.batch_ramp]

    def fewest_workers(self) -> int:
        """Workers that the run needs at least."""
        return self.workers if self.min_workers is None else self.min_workers

    def worker_counts(self, config: ModelConfig | None = None) -> list[int]:
        """Numbers of workers that the run can have, rising; ``config`` is the shape where ``model`` does not say."""
        config, counts = config or self.model.config(256, self.length()), []
        for workers in range(self.fewest_workers(), self.workers + 1):
            with contextlib.suppress(ValueError):
                self.parallelism.check(workers, config, self.length())
                counts.append(workers)
        return counts

    def length(self) -> int:
        """Tokens in a sequence."""
        return self.sequence_length or PRESETS[self.model.preset].max_seq_len


@dataclass
class SearchDimension:
    """One dimension of a search space; give either `values`, or `low` and `high`."""

    values: list[Any] | None = None
    """Choices to draw from."""
    low: float | None = None
    """Smallest value."""
    high: float | None = None
    """Largest value."""
    scale: Literal["linear", "log"] = "log"
    """How values between low and high are spread."""
    step: float | None = None
    """Only low, and what lies whole multiples of this above it up to high; null takes any value between them."""
    when: dict[str, list[Any]] | None = None
    """Drawn only where other dimensions, which stand before this one, have one of the values given, such as
    `{optimizer.kind: [muon]}`; elsewhere the setting stays as it is."""

    def check(self, name: str, before: dict[str, SearchDimension]) -> None:
        """Raise SettingsError unless the setting ``name`` has something to draw from, and what it hangs on is known.

        Args:
            name: dotted name of the setting.
            before: the dimensions that stand before it.
        """
        setting, range_given = f"space of {name}", self.low is not None or self.high is not None
        for other, wanted in (self.when or {}).items():
            choices = before[other].values if other in before else None
            known = choices is not None and all(value in choices for value in wanted)
            require(known, f"when in the {setting}", self.when, "values in the lists of dimensions before it")
        if self.values is not None:
            require(bool(self.values) and not range_given, setting, self, "either values, or low and high")
            require(self.step is None, f"step in the {setting}", self.step, "null beside values")
            return
        in_order = self.low is not None and self.high is not None and self.low < self.high
        require(in_order, setting, self, "values, or low below high")
        require(self.scale == "linear" or self.low > 0, f"low in the {setting}", self.low, "above 0 on a log scale")
        fits = self.step is None or 0 < self.step <= self.high - self.low
        require(fits, f"step in the {setting}", self.step, "above 0 and at most high - low")


# What the sweep decides for every trial.
_SWEEPS_OWN = ("workspace", "name", "on_change", "steps", "validate_every", "checkpoint_every", "keep_checkpoints")

# What may change in the middle of a run without making it another one, as PBT does it.
_MID_RUN = ("optimizer.lr", "optimizer.betas", "optimizer.eps", "optimizer.momentum", "optimizer.weight_decay",
    "optimizer.grad_clip", "schedule.min_ratio", "schedule.decay", "schedule.decay_fraction", "z_loss")  # fmt: skip


@dataclass
class TuneJob(InWorkspace):
    """Search training settings with Ray Tune; each trial is a Ray Train run, stopped early when it falls behind."""

    name: str = "sweep"
    """Name of the sweep; the same name goes on where the sweep was."""
    pretrain: PretrainJob = field(default_factory=PretrainJob)
    """What every trial trains; its workspace and name are set by the sweep."""
    space: dict[str, SearchDimension] | None = None
    """Settings of `pretrain` by their dotted name, and what to try for each, such as
    `{optimizer.lr: {low: 1e-4, high: 1e-2}, seed: {values: [0, 1]}}`; null tries that range of learning rates."""
    search: Literal["random", "tpe", "bohb"] = "random"
    """Where new settings come from. tpe: Optuna's model of what the trials before came to, those that were stopped
    behind the others. bohb: the same of the losses at the latest step that enough trials have reached, trials that
    still run among them, and every third one at random."""
    scheduler: Literal["asha", "median", "pbt", "none"] = "asha"
    """asha stops all but the best part at each rung; median those worse than the median of the others; pbt stops none:
    the worst part of the trials goes on from the weights of the best, with settings that differ a little."""
    trials: int = 8
    """Settings that are tried; more may be asked for later. With pbt, the size of the population."""
    concurrent_trials: int | None = None
    """Trials at the same time; null as many as the cluster has resources for, or can start nodes for. A part of a GPU
    for each: `--pretrain.gpus_per_worker 0.25`."""
    budget_hours: float | None = None
    """GPU hours, without GPUs CPU core hours, after which no new trial starts; null for no limit."""
    comparisons: int = 4
    """How often a trial validates and is compared with the others, evenly over its steps."""
    reduction_factor: int = 2
    """ASHA lets one trial in this many go on from rung to rung; rungs lie this factor of steps apart."""
    transfer_to: ModelSettings | None = None
    """A wider model of the same depth and kind of heads, such as `{preset: 124m}` for a `pretrain.model` of
    `{preset: 124m, d_model: 192, n_heads: 3, n_kv_heads: 3, d_ff: 512}`: writes its recipe, target.yaml, too, whose
    learning rate carries over (muP)."""
    seed: int = 0
    """Of the settings that are drawn."""

    def validate(self) -> None:
        """Raise SettingsError for what cannot work, before anything is started."""
        require(self.space != {}, "space", self.space, "at least one setting of pretrain, or null")
        for name in ("trials", "concurrent_trials", "comparisons"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "at least 1")
        require(self.budget_hours is None or self.budget_hours > 0, "budget_hours", self.budget_hours, "above 0")
        require(self.comparisons <= self.pretrain.steps, "comparisons", self.comparisons, "at most pretrain.steps")
        # Trials are compared as they report, which losses that come later would miss.
        measured = self.pretrain.validation
        require(measured == "within", "pretrain.validation", measured, "within, for trials to be compared by it")
        tasks = self.pretrain.evaluate.tasks
        require(not tasks, "pretrain.evaluate.tasks", tasks, "empty: trials are compared by their validation loss")
        require(self.reduction_factor >= 2, "reduction_factor", self.reduction_factor, "at least 2")
        if self.scheduler == "pbt":
            require(self.search == "random", "search", self.search, "random with pbt, which searches by itself")
            require(self.trials >= 2, "trials", self.trials, "at least 2 with pbt")
        before: dict[str, SearchDimension] = {}
        for name, dimension in self.dimensions().items():
            require(name not in _SWEEPS_OWN, "space", name, f"none of {', '.join(_SWEEPS_OWN)}, which are the sweep's")
            movable = self.scheduler != "pbt" or name in _MID_RUN
            require(movable, "space", name, f"with pbt one of {', '.join(_MID_RUN)}, which may change within a run")
            dimension.check(name, before)
            for value in dimension.values or [dimension.low, dimension.high]:
                checked(with_setting(self.pretrain, name, value))
            before[name] = dimension
        if self.transfer_to is not None:
            shapes = [name for name in before if name.startswith("model.")]
            require(not shapes, "space", shapes, "without the model's shape, which transfer_to widens")
            taken = self.pretrain.init_from
            require(taken is None, "pretrain.init_from", taken, "null with transfer_to, which widens random weights")
            self._check_transfer(self.transfer_to)

    def _check_transfer(self, target: ModelSettings) -> None:
        """Raise SettingsError unless what was tuned on ``pretrain.model`` serves ``target`` (`models.widths`)."""
        # Vocabularies are the tokenizer's; any will do to compare shapes.
        proxy, wide = (model.config(256, self.pretrain.length()) for model in (self.pretrain.model, target))
        width, head = proxy.d_model, wide.head_dim
        require(wide.d_model >= width, "transfer_to.d_model", wide.d_model, f"at least pretrain.model's {width}")
        same = ("n_layers", "qk_norm", "tied_embeddings", "rope_theta")
        keeps = all(getattr(proxy, name) == getattr(wide, name) for name in same) and width % head == 0
        ratio = wide.d_model / width
        # Rounding d_ff to a size that kernels like does no harm.
        keeps = keeps and (proxy.n_heads, proxy.n_kv_heads) == (wide.n_heads / ratio, wide.n_kv_heads / ratio)
        keeps = keeps and abs(proxy.d_ff * ratio / wide.d_ff - 1) < 0.05
        unit = head * wide.n_heads // wide.n_kv_heads  # a narrow model has a whole number of groups of heads
        narrow = unit * max(round(width / unit), 1)
        example = {"d_model": narrow, "n_heads": narrow // head, "n_kv_heads": narrow // unit}
        example |= {"d_ff": round(wide.d_ff * narrow / wide.d_model)} | {name: getattr(wide, name) for name in same}
        require(
            keeps, "pretrain.model", {name: getattr(proxy, name) for name in example},
            f"what transfer_to is but for its width, such as {example}",
        )  # fmt: skip

    def dimensions(self) -> dict[str, SearchDimension]:
        """The search space, settings by their dotted name."""
        return self.space or {"optimizer.lr": SearchDimension(low=1e-4, high=1e-2)}


@dataclass
class LadderJob(InWorkspace):
    """Predict a big run from a ladder of small ones by a scaling law, and find the best size for a budget."""

    name: str = "ladder"
    """Name of the ladder; the same name goes on where it was, and takes the rungs that are there."""
    pretrain: PretrainJob = field(default_factory=PretrainJob)
    """The target, a run too big to try: what it would be told. The rungs are it in narrow and with fewer steps. Its
    learning rate is that of width `model.base_width`, or, when null, of its own width; muP makes it the rungs' too."""
    widths: list[int] | None = None
    """d_model of the rungs; heads and feed-forward layers shrink in proportion. null: four sizes from a 32nd to a
    quarter of the target's parameters."""
    layers: list[int] | None = None
    """Blocks of each of the `widths`; null: as many as the target has. Learning rates carry over between widths."""
    tokens_per_parameter: list[float] = field(default_factory=lambda: [10.0, 20.0, 40.0])
    """Each size is trained at each of these. With a single one the fit has to take it for compute-optimal."""
    gpu_hours: float | None = None
    """Budget to find the best size and tokens for: hours times GPUs (of a run on CPUs, times workers)."""
    flops_per_second: float | None = None
    """What a GPU does of the target's floating-point operations; null takes what the biggest rung did, though small
    models use a GPU less well than big ones."""
    concurrent: int | None = None
    """Rungs at the same time; null as many as the resources allow."""

    def validate(self) -> None:
        """Raise SettingsError for what cannot work, before anything is started."""
        require(bool(self.name) and "/" not in self.name, "name", self.name, "a folder's name without a slash")
        widths, layers = self.widths, self.layers
        require(widths is None or min(widths, default=0) >= 1, "widths", widths, "numbers of at least 1, or null")
        fits = layers is None or (widths is not None and len(layers) == len(widths) and min(layers) >= 1)
        require(fits, "layers", layers, "null, or as many numbers of at least 1 as widths has")
        ratios = self.tokens_per_parameter
        positive = min(ratios, default=0) > 0 and len(set(ratios)) == len(ratios)
        require(positive, "tokens_per_parameter", ratios, "different numbers above 0")
        for name in ("gpu_hours", "flops_per_second"):
            require(getattr(self, name) is None or getattr(self, name) > 0, name, getattr(self, name), "above 0")
        require(self.concurrent is None or self.concurrent >= 1, "concurrent", self.concurrent, "at least 1, or null")
        taken = self.pretrain.init_from
        require(taken is None, "pretrain.init_from", taken, "null: the rungs of a ladder are trained from scratch")
        tasks = self.pretrain.evaluate.tasks
        require(not tasks, "pretrain.evaluate.tasks", tasks, "empty: rungs are compared by their validation loss")
        ramp = self.pretrain.batch_ramp
        require(not ramp, "pretrain.batch_ramp", ramp, "empty: rungs of different lengths would ramp differently")


@dataclass
class EvaluateJob(Scoring, Placed):
    """Score a trained model on tasks of lm_eval, and by its validation loss and bits per byte."""

    steps: str | list[int] | None = None
    """Several checkpoints of the run, one after the other: their steps, or all; null takes `step`."""
    workers: int | None = None
    """Copies of the model that work at the same time; null one for each GPU, without GPUs a single one."""
    validation_samples: int | None = None
    """Sequences of the validation split to measure, evenly from all of it; null as many as pretraining did, 0 none.
    Only of runs, not of a `model`."""
    batch: int = 16
    """Sequences of the validation split that are scored at a time."""

    def validate(self) -> None:
        """Raise SettingsError for what cannot work, before anything is loaded."""
        Placed.validate(self)
        Scoring.validate(self)
        steps = self.steps
        fits = steps in (None, "all") or (isinstance(steps, list) and bool(steps))
        require(fits, "steps", steps, "all, a list of steps, or null")
        require(steps is None or (self.model is None and self.step is None), "steps", steps, "null with step or model")
        require(self.workers is None or self.workers >= 1, "workers", self.workers, "at least 1, or null")
        samples = self.validation_samples
        require(samples is None or samples >= 0, "validation_samples", samples, "at least 0, or null")
        require(self.batch >= 1, "batch", self.batch, "at least 1")
        nothing = not self.task_names() and (self.model is not None or samples == 0)
        require(not nothing, "tasks", self.tasks, "at least one, since the validation loss is not measured")


@dataclass
class GenerateJob(Placed):
    """Continue a text with a trained run."""

    prompt: str = ""
    """Text to continue; empty starts a new document."""
    prompts: str | None = None
    """File of many texts to continue instead: one a line, or JSON lines with a field `prompt` (.jsonl)."""
    output: str | None = None
    """With prompts: the file of JSON lines to write; null is generated/PROMPTS.jsonl in the workspace."""
    batch: int | None = None
    """With prompts: texts that are continued at the same time; null suits the device."""
    interactive: bool = False
    """Continue one text after the other that is typed or piped in, until the end of the input."""
    max_new_tokens: int = 100
    """Tokens to add at most; generation also ends with the document."""
    temperature: float = 0.8
    """Divides the logits; 0 always takes the likeliest token."""
    top_p: float = 0.95
    """Draw from the likeliest tokens that together have this probability."""
    seed: int = 0
    """Of the draws."""

    def validate(self) -> None:
        """Raise SettingsError for what cannot work, before anything is loaded."""
        super().validate()
        ways = [bool(self.prompt), self.prompts is not None, self.interactive]
        if sum(ways) > 1:
            raise SettingsError("give one of prompt, prompts and interactive")
        require(self.output is None or self.prompts is not None, "output", self.output, "null without prompts")
        require(self.batch is None or self.batch >= 1, "batch", self.batch, "at least 1, or null")
        require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1")
        require(self.temperature >= 0, "temperature", self.temperature, "at least 0")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")


@dataclass
class ServeJob(Placed):
    """Serve a trained model over HTTP as OpenAI's completions, with a page to try it."""

    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 lets every machine in. The connection is not encrypted."""
    port: int = 8000
    """Port to listen at."""
    api_key_env: str | None = None
    """Environment variable with the key that clients have to show; null makes one up and prints it once."""
    replicas: int = 1
    """Copies of the model that share the requests."""
    gpus_per_replica: float = 1.0
    """GPUs reserved for each on GPUs: 1, or a part of one, so that small models share it."""
    slots: int | None = None
    """Texts that a replica continues at the same time; null takes what memory allows."""
    length: int | None = None
    """Longest text, prompt and continuation, in tokens; null takes the model's. Memory is slots times that."""
    max_tokens: int | None = None
    """What a request may ask for in each text; null takes `length`."""
    max_texts: int = 64
    """Prompts times `n` of a request."""
    max_waiting: int = 256
    """Texts that may wait at a replica for a slot; more are refused with status 429."""
    max_request_bytes: int = 1 << 20
    """Size of a request."""

    def validate(self) -> None:
        """Raise SettingsError for what cannot work, before anything is started."""
        Placed.validate(self)
        for name in ("replicas", "slots", "length", "max_tokens", "max_texts", "max_request_bytes"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "at least 1")
        require(1 <= self.port <= 65535, "port", self.port, "from 1 to 65535")
        require(0 < self.gpus_per_replica <= 1, "gpus_per_replica", self.gpus_per_replica, "above 0 and at most 1")
        require(self.max_waiting >= 0, "max_waiting", self.max_waiting, "at least 0")


@dataclass
class ExportJob(OfRun):
    """Write a trained model as a folder that `transformers` loads, and for llama.cpp; push it to a hub."""

    output: str | None = None
    """Folder to write; null is exports/NAME in the workspace."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Of the weights in the files; fp32 is what they were trained in."""
    max_shard_size: str = "5GB"
    """Bytes in a file of weights at most, such as 500MB; larger models are split, with an index."""
    gguf: Literal["f16", "bf16", "f32", "q8_0"] | None = None
    """Write a GGUF file for llama.cpp too, with matrices of this kind; null writes none."""
    push_to: str | None = None
    """Repository of the hub to push the folder to, as OWNER/NAME; null keeps it here."""
    public: bool = False
    """A repository that is made for it is public."""

    def validate(self) -> None:
        """Raise SettingsError for what cannot work, before anything is loaded."""
        self.shard_bytes()
        target = self.push_to
        named = target is None or re.fullmatch(r"[\w.-]+/[\w.-]+", target)
        require(bool(named), "push_to", target, "a repository's name, as OWNER/NAME")

    def shard_bytes(self) -> int:
        """``max_shard_size`` in bytes."""
        found = re.fullmatch(r"(\d+)\s*(KB|MB|GB|)", str(self.max_shard_size).upper())
        size = 0 if found is None else int(found[1]) * {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}[found[2]]
        require(size > 0, "max_shard_size", self.max_shard_size, "a size above 0 such as 500MB or 5GB")
        return size


@dataclass
class FlowJob(InWorkspace):
    """The whole flow of a recipe: curate, tokenizer, tokenize, pretrain, evaluate; goes on where it stopped."""

    curate: CurationSettings = field(default_factory=CurationSettings)
    """Sources, filters and deduplication."""
    tokenizer: TokenizerChoice = field(default_factory=TokenizerChoice)
    """The byte-level BPE tokenizer."""
    tokenize: TokenizeSettings = field(default_factory=TokenizeSettings)
    """Token shards."""
    pretrain: PretrainJob = field(default_factory=PretrainJob)
    """The training run; its workspace is the flow's."""
    evaluate: EvaluateJob = field(default_factory=EvaluateJob)
    """How the run is scored; its workspace is the flow's and its name pretrain's."""

    def validate(self) -> None:
        """Raise SettingsError for what cannot work, before anything is started."""
        for section in (self.pretrain, self.evaluate):
            own = section.workspace in (InWorkspace.workspace, self.workspace)
            require(own, "workspace of a step", section.workspace, f"that of the flow, {self.workspace}")
        name = self.evaluate.name
        require(name in (OfRun.name, self.pretrain.name), "evaluate.name", name, f"pretrain's, {self.pretrain.name}")


@dataclass
class ReportJob(InWorkspace):
    """Draw a run as one HTML page."""

    name: str = "base"
    """Run to draw."""


@dataclass
class DemoJob(InWorkspace):
    """The whole flow on one machine in minutes, on text that every Python installation has."""

    chaos: bool = False
    """Kill a worker and poison a stretch of data on the way, to watch the run recover."""
    steps: int | None = None
    """Optimizer steps of the pretraining run; null takes the recipe's."""

    def validate(self) -> None:
        """Raise SettingsError for what cannot work, before anything is started."""
        require(self.steps is None or self.steps >= 20, "steps", self.steps, "at least 20")


def with_setting(settings: Any, name: str, value: Any) -> Any:
    """A copy of settings with one of them, by its dotted name, set to ``value``; whole numbers stay whole.

    Raises:
        SettingsError: there is no setting of that name, it is a group of settings, or the value is of another kind.
    """
    return _with_setting(settings, name.split("."), name, value)


def _with_setting(settings: Any, path: list[str], name: str, value: Any) -> Any:
    head, *rest = path
    known = [f.name for f in dataclasses.fields(settings)]
    require(head in known, "space", name, f"a setting of pretrain; at {head!r} it could go on with {', '.join(known)}")
    old = getattr(settings, head)
    if rest:
        require(dataclasses.is_dataclass(old), "space", name, f"a setting of pretrain; {head} has no parts")
        return dataclasses.replace(settings, **{head: _with_setting(old, rest, name, value)})
    require(not dataclasses.is_dataclass(old), "space", name, "a single setting, not a group of them")
    return dataclasses.replace(settings, **{head: _of_type(get_type_hints(type(settings))[head], name, value)})


def _of_type(hint: Any, name: str, value: Any) -> Any:
    """``value`` as a setting of that type holds it: a number rounded for whole ones, a list as a tuple."""
    if get_origin(hint) is Literal:
        require(value in get_args(hint), name, value, f"one of {', '.join(map(str, get_args(hint)))}")
        return value
    kinds = [get_origin(kind) or kind for kind in (get_args(hint) if get_origin(hint) is UnionType else [hint])]
    if float in kinds and str not in kinds and isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)  # YAML 1.1 takes 1e-3 for a text
    if int in kinds and isinstance(value, float):
        return round(value)
    if tuple in kinds and isinstance(value, list):
        return tuple(value)
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    exact = any(type(value) is kind for kind in kinds)  # a truth value is no number, though Python's is
    require(exact, name, value, f"of type {' or '.join(kind.__name__ for kind in kinds)}")
    return value


def checked(settings: Any, path: str = "") -> None:
    """Call ``validate`` of a settings dataclass and of all inside it, so that nothing starts with bad settings.

    Args:
        settings: the dataclass.
        path: its dotted name within the job's settings.

    Raises:
        SettingsError: with the setting's name, its value and what is allowed.
    """
    for inner in dataclasses.fields(settings):
        value = getattr(settings, inner.name)
        for item in value if isinstance(value, list) else value.values() if isinstance(value, dict) else [value]:
            if dataclasses.is_dataclass(item):
                checked(item, f"{path}.{inner.name}".strip("."))
    try:
        if hasattr(settings, "validate"):
            settings.validate()
    except ValueError as error:
        group = path.rpartition(".")[2]
        # Groups that are only ever used under one name say it themselves.
        named = not path or str(error).startswith(f"{group}.")
        prefix = path.removesuffix(group) if named else f"{path}."
        raise SettingsError(f"{prefix}{error}") from None
