"""The configuration of a run: typed, frozen, flat.

Every field is one command-line flag and one key of a configuration file, both of the field's name, so names
are unique across groups. Fields whose default depends on data, model or method are "auto" or None until
`fastdynat.training.resolve` fills them; the resolved configuration is what a run stores. The string under a
field is its help text.
"""

from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

OptionsT = TypeVar("OptionsT")
AutoAmp = Literal["default", "auto", "off", "bf16", "fp16"]
EvalAmp = Literal["off", "auto", "bf16", "fp16"]
Kernels = Literal["auto", "eager", "cpp", "cuda", "triton"]
CompileMode = Literal["off", "auto", "default", "max-autotune"]
Switch = Literal["auto", "on", "off"]
Loader = Literal["auto", "dali", "resident", "torch"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Images."""

    data: str = "digits"
    """Dataset: digits (embedded), cifar10, cifar100, svhn, mnist, imagefolder,
    hf:NAME_OR_FOLDER (parquet files, the Hugging Face hub), or path/to/file.py:callable, which returns
    tensors or a torch Dataset."""
    data_dir: str = "data"
    """Folder of the dataset, where it is also downloaded to; for imagefolder, the folder that holds train/
    and test/."""
    download: bool = True
    """Fetch a torchvision dataset that is not in --data-dir, or a dataset of the Hugging Face hub."""
    image_size: int | None = None
    """Resize and centre-crop an image folder's images to this size; None keeps theirs."""
    train_size: int | None = None
    """Train on a class-stratified subset of this many images; None is all."""
    labelled: int | None = None
    """Semi-supervised training (vat): keep the labels of only this many training images, class-stratified;
    None is all."""
    val_size: float | None = None
    """Images held out of training for model selection: a number, or a share below 1; None is 1000, or 10 % of
    small data."""
    augment: Literal["auto", "none", "flip", "crop", "crop-flip"] = "auto"
    """Augmentation; auto is the dataset's usual one (crop-flip for CIFAR)."""
    pad_mode: Literal["zeros", "reflect"] = "zeros"
    """Padding of the random crops: zeros, or the image mirrored at its border (Rice et al., AWP, Bag of
    Tricks)."""
    epoch_steps: int | None = None
    """Updates in an epoch; None is one pass over the images. A larger number continues with the images in
    another order; a smaller one ends the epoch early."""
    batch_size: int | None = None
    """Images per step; None is 128, or 64 for digits."""
    drop_last: bool = False
    """Skip the last, incomplete batch of each epoch (different images in each epoch). Otherwise it is trained
    on, but without torch.compile and CUDA graphs, which are specific to a batch size."""
    eval_batch_size: int = 500
    """Images per evaluation batch."""
    loader: Loader = "auto"
    """Loader of training batches: resident (images in device memory), dali (extra `dali`) or torch (worker
    processes). auto is resident if the images take at most a quarter of the memory, else dali if it is
    installed, else torch."""
    workers: int | None = None
    """Worker processes of the torch loader, or threads of dali; None is the number of cores minus one, at
    most 8."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Networks."""

    model: str = "auto"
    """Network to train: small, resnet18, resnet18_s1122, preact_resnet18, wrn-D-W (each also with -silu, -gn
    or -silu-gn for SiLU, group norm, both; wrn then also with -same, the padding of DeepMind's and DyART's
    code), torchvision:NAME, timm:NAME, or path/to/file.py:callable, which returns a module; auto is small for
    digits, else resnet18."""
    guide: str = "auto"
    """Guide network (DYNAT, LBGAT, AdaGAT, HAT and distillation); auto is that of --guide-from, else
    resnet18_s1122 (the released code's), or small if the model is small."""
    guide_from: str | None = None
    """Run directory (its best checkpoint) or .safetensors file with the guide's weights: the frozen guide
    of hat, ard, rslad, iad and distillation, or where a guide's own training starts."""
    bn_momentum: float | None = None
    """Momentum of batch norm: the weight of a new batch in the running statistics; None keeps the network's
    own, which is 0.1 in the built-in networks."""
    sync_bn: Switch = "auto"
    """With several processes (torchrun), on computes batch norm's training statistics over the images of all
    processes, so that they do not depend on the world size; off computes them over each process's own images
    and averages the running statistics after each update. auto is on if a process has fewer than 32 images of
    a micro-batch (--batch-size / processes / --grad-accum-steps), and with one process, where it has no
    effect until the run is resumed on several. The attack is synchronised too with --attack-bn train or
    frozen; with eval it communicates nothing."""
    bn_reset_epoch: int | None = None
    """Epoch at whose first step the model's running statistics are replaced by those of the batch, counted
    from 0, and again from 0 after the burn-in; None is never (DyART's release: 1)."""
    normalize: Literal["none", "dataset", "released"] = "none"
    """Mean/std layer inside the networks; inputs are in [0, 1] either way. DYNAT's code has none. released
    uses the constants of published code (CIFAR-10: red has standard deviation 0.2471, not 0.2470), or the
    data set's own if there are none."""


@dataclass(frozen=True, kw_only=True)
class AttackConfig:
    """Inner attack, and the radius of evaluation. Radii and step sizes: 8/255, 0.031, or 8 (read as
    8/255)."""

    norm: Literal["linf", "l2"] = "linf"
    """Threat model."""
    eps: float | str = "auto"
    """Radius in training; auto is the dataset's (0.031 for colour images)."""
    step_size: float | str = "auto"
    """Step of the attack; auto is the method's: eps / 4 (0.007 for the published eps of 0.031), more
    for single-step methods."""
    steps: int | None = None
    """Steps of the attack; None is the method's: 10, 20 for dyart, 1 for fgsm_rs, n_fgsm and free."""
    early_steps: int | None = None
    """Changes the algorithm: use this many attack steps in the first --early-share of the epochs; None is
    --steps throughout. Faster; docs/results.md gives the cost in robust accuracy."""
    early_share: float = 0.5
    """Share of the epochs in which --early-steps applies."""
    start: Literal["auto", "none", "uniform", "gaussian"] = "auto"
    """Starting point of the attack: the image, or a random point around it; auto is the method's published
    choice."""
    attack_bn: Literal["eval", "train", "frozen"] = "eval"
    """Batch norm during the attack: running statistics, batch statistics, or batch statistics without
    updating. With train, every forward pass of the attacked network updates the running statistics, including
    a method's pass for its clean prediction."""
    eval_eps: float | str = "auto"
    """Radius in validation and evaluation; auto is eps, or 8/255 if eps is the published 0.031."""
    awp: float = 0.0
    """Adversarial weight perturbation around each update, relative to each tensor's norm (usual: 0.005,
    0.01); 0 is off."""
    awp_warmup: int = 0
    """Epochs without weight perturbation at the start."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimiser and schedule."""

    epochs: int | None = None
    """Epochs; None is 100, or 15 for digits."""
    lr: float | None = None
    """Peak learning rate of SGD; None is 0.1, or 0.03 for digits."""
    momentum: float = 0.9
    """SGD momentum."""
    cycle_momentum: bool = False
    """onecycle, triangular: cycle the momentum inversely to the learning rate, between --max-momentum and
    --base-momentum, instead of --momentum. This is the default of torch's OneCycleLR and CyclicLR, and so of
    most releases that use them."""
    base_momentum: float | None = None
    """Momentum at the highest learning rate; None is torch's, 0.85 for onecycle and 0.8 for triangular."""
    max_momentum: float | None = None
    """Momentum at the lowest learning rate; None is torch's, 0.95 for onecycle and 0.9 for triangular."""
    nesterov: bool = False
    """Nesterov momentum."""
    weight_decay: float = 2e-4
    """L2 weight decay."""
    decay_norms: bool = True
    """Apply weight decay to the parameters of normalisation layers, too; --no-decay-norms exempts them
    (DyART, Gowal et al.)."""
    burn_in: int = 0
    """Number of epochs, out of --epochs, of natural training (cross-entropy on clean images, at the peak
    rate) before the method starts. The method starts from the weight average, if there is one, with a fresh
    optimiser; schedule, warm-ups and ramps count from there. --clip-grad does not apply to the burn-in."""
    burn_in_lr: float | None = None
    """Learning rate of the burn-in; None is --lr."""
    schedule: Literal["release", "multistep", "cosine", "onecycle", "triangular", "constant"] = "release"
    """Learning rate schedule. release is that of DYNAT's code (one epoch at lr/5, then lr, divided by 10
    after 75 % and again after 90 %); triangular goes from 0 to lr and back to 0."""
    warmup: float | None = None
    """onecycle, triangular: position of the peak, as a share of the run; None is 0.3 for onecycle, 0.5 for
    triangular."""
    milestones: tuple[float, ...] = (0.5, 0.75)
    """multistep: positions of the drops, as shares of the run."""
    gamma: float = 0.1
    """multistep: factor of each drop."""
    schedule_by: Literal["step", "epoch"] = "step"
    """cosine, onecycle, triangular: update learning rate and cycled momentum at every step, or once per
    epoch, as many releases do."""
    schedule_ahead: int = 0
    """Run the schedule of learning rate and cycled momentum this many updates ahead: with 1, the rate drops
    one update early (Rice et al.)."""
    optimizers: Literal["separate", "joint"] = "separate"
    """One SGD per network, or one for both; they differ only in gradient clipping, where joint uses the joint
    norm."""
    grad_accum_steps: int = 1
    """Cut each batch into this many micro-batches, attack them one after the other, and make one update from
    the sum of their gradients: less memory, the same update. --batch-size still counts the images of an
    update. Batch norm sees one micro-batch at a time."""
    zero1: bool = False
    """With several processes (torchrun), shard the optimiser's state (ZeRO stage 1): each process keeps the
    momentum of some of the weights, updates those weights and broadcasts them. The update is the same. Rules
    out CUDA graphs."""
    clip_grad: float = 0.0
    """Clip the gradient norm to this; 0 is off."""
    ema: float = 0.0
    """Decay of an exponential moving average of the weights, such as 0.999; 0 is off. The average is updated
    once per batch, and is what is validated and saved as the model."""
    ema_warmup: float = 0.0
    """Share of the run in which the average is a plain copy; after that, its decay at step s is
    min(ema, (1 + s) / (10 + s)). With 0, the decay is ema from the first step on."""
    ema_buffers: Literal["average", "copy"] = "average"
    """Running statistics of the average: averaged like the weights, or copied from the model."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Device, precision and speed."""

    device: str = "auto"
    """cpu, cuda, cuda:N; auto is a GPU if there is one."""
    amp: AutoAmp = "default"
    """Mixed precision, in the attack and in the update; auto, or a bare --amp, is the fastest precision on
    this machine; bf16 and fp16 force it; default is bf16 on a GPU that has it, else float32."""
    compile: CompileMode = "off"
    """torch.compile of the attack's step and of the trained networks; auto, or a bare --compile, is default
    where that is faster for this run on this machine, else off."""
    kernels: Kernels = "auto"
    """Implementation of the fused operators; auto is FASTDYNAT_KERNELS if it is set, else the fastest
    that is correct on this machine."""
    channels_last: Switch = "auto"
    """Channels-last memory format; auto is whichever is faster on this machine; a bare --channels-last is
    on."""
    fold: Switch = "auto"
    """Fold batch norm into the convolutions of the attacked network; auto is on if batch norm is in
    eval mode in the attack."""
    fused_conv: Switch = "auto"
    """Compute convolution, bias, residual and ReLU of the folded network in one cuDNN kernel; auto is on for
    a GPU, in the layers where the kernel was found correct and faster."""
    winograd: Switch = "auto"
    """Winograd's algorithm for the attacked network's 3x3 convolutions, in float32 on the CPU, in the layers
    where it is faster."""
    closed_form: bool = True
    """Compute the attack's gradient at the logits by formula instead of by autograd."""
    graphs: Switch = "auto"
    """Capture the training step as a CUDA graph; auto is on for a GPU."""
    guide_stream: Switch = "auto"
    """Run the guide on a separate CUDA stream, in parallel with the attack; auto is on for a GPU."""
    check_fidelity: int = 0
    """At each validation, compare the attack with the eager float32 one on this many validation images; 0 is
    off."""
    boundary_speed: int = 0
    """At each validation, measure margins of this many validation images and how fast the updates move the
    decision boundary towards or away from them (L-inf); 0 is off. `fastdynat boundary RUN` draws them."""
    seed: int = 1
    """Seed of initialisation, data order, augmentation and attacks."""
    deterministic: bool = False
    """On a GPU: use only deterministic algorithms, the same ones in every process (slower), so that a resumed
    run equals an uninterrupted one bit for bit on the same kind of GPU with the same versions; without it,
    within rounding. On the CPU it is exact either way, with the same processor, number of threads and
    versions."""
    rank_timeout: float = 10.0
    """With several processes (torchrun), the time limit in minutes for every rank to join the rendezvous and
    each collective. After that the missing rank is named, and all processes end."""


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Validation, checkpoints and log."""

    stop_at: float | None = None
    """Stop once the validation score by which the best checkpoint is chosen reaches this value, a share such
    as 0.45."""
    patience: int | None = None
    """Stop after this many validations without a better score (robust early stopping); None is never."""
    on_collapse: Literal["off", "warn", "stop"] = "warn"
    """Reaction to catastrophic overfitting of single-step attacks: validation PGD accuracy more than 20
    points below its best while accuracy on attacked training images is not. Only for methods that log that
    accuracy."""
    save_every: float = 10.0
    """Minutes between checkpoints inside an epoch (each epoch's end is always saved)."""
    val_every: int = 1
    """Epochs between validations; the last epoch is always validated."""
    tensorboard: bool = False
    """Also write TensorBoard events (extra `tensorboard`)."""
    quiet: bool = False
    """Print no progress, only notices, warnings and errors."""


@dataclass(frozen=True, kw_only=True)
class RunConfig(LogConfig):
    """Run directory and log."""

    run_dir: str | None = None
    """Run directory; None is a new folder under runs/."""
    overwrite: bool = False
    """Replace an existing run in --run-dir."""
    stop_after: int | None = None
    """Pause after this many epochs, as Ctrl-C would; --resume continues."""


GROUPS = ("data", "model", "attack", "optim", "engine", "run")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Generic[OptionsT]):
    """Train a network."""

    method: str = "dynat"
    """Training method: a name of fastdynat.methods, or path/to/file.py:CLASS for your own. --method NAME
    --help lists its options."""
    options: OptionsT
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    attack: AttackConfig = field(default_factory=AttackConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    run: RunConfig = field(default_factory=RunConfig)
