//! The command line as clap sees it; what the commands do lives in `commands`.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use segdistill_ops::Precision;

/// Knowledge distillation for semantic segmentation.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", version, max_term_width = 110, after_help = EXAMPLES)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

const EXAMPLES: &str = "\
Examples:
  cargo xtask reproduce                                            teacher, student, distilled student on drawn scenes
  cargo xtask reproduce --recipe camvid-quick --data-root DIR      the same on real CamVid, made for two cores
  cargo xtask reproduce --set optim.lr=0.02 --seeds 0,1,2          change one key, run three seeds
  cargo xtask data check --dataset camvid --data-root DIR          is the data set whole?
  cargo xtask eval --predictions OUT --labels GT --dataset camvid  score label images made by anything

Exit codes: 0 ok, 1 failed, 2 usage or configuration, 3 data check failed, 4 needed file unavailable,
5 result outside the expected band, 130/143 interrupted after a checkpoint was written.";

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Train teacher, student and distilled student, evaluate them on every split, write the report
    Reproduce(Reproduce),
    /// Train one stage of a recipe
    Train(Train),
    /// Train one objective over a grid of its settings, beside cross entropy alone, and compare
    Sweep(Sweep),
    /// Score a trained stage, or label images made by anything
    Eval(Eval),
    /// Write label images and overlays for images or folders of images
    Predict(Predict),
    /// Write the report of finished runs
    Report(Report),
    /// Check, measure and look at data sets
    #[command(subcommand)]
    Data(Data),
    /// List and describe networks
    #[command(subcommand)]
    Models(Models),
    /// List, fetch, inspect, import, export and verify weights
    #[command(subcommand)]
    Weights(crate::commands::weights::Weights),
    /// Time every operation and whole steps, beside PyTorch
    Bench(Bench),
    /// Check the repository's own rules: crate arrows, module docs, machine paths, file sizes
    Tidy,
    /// What continuous integration runs: formatting, clippy, tidy, tests, documentation
    Ci,
}

/// Where to run.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct DeviceArgs {
    /// Where to run: cpu or cuda:N; default: cuda:0 if this program was built for CUDA and the machine has one, else cpu
    #[arg(long, value_name = "DEVICE")]
    pub(crate) device: Option<String>,
    /// On CUDA, let products of f32 numbers use TF32 tensor cores: faster, with 10 bits of mantissa
    #[arg(long)]
    pub(crate) tf32: bool,
}

/// Which recipe, with what changed.
#[derive(Clone, Debug, Args)]
pub(crate) struct RecipeArgs {
    /// Recipe name (toy, camvid, camvid-quick, cityscapes, cityscapes-segformer) or a TOML file
    #[arg(long, default_value = "toy", value_name = "NAME|FILE")]
    pub(crate) recipe: String,
    /// Folder of the data set; default: $SEGDISTILL_DATA_DIR/NAME
    #[arg(long, value_name = "DIR")]
    pub(crate) data_root: Option<PathBuf>,
    /// Change one key of the recipe, such as optim.lr=0.02 or student.width=0.5; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub(crate) set: Vec<String>,
    /// Run folder; default: runs/ and the recipe's name
    #[arg(long, value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,
    /// Seeds, one student each
    #[arg(long, value_delimiter = ',', value_name = "N,N")]
    pub(crate) seeds: Option<Vec<u64>>,
    /// Objectives of the student, such as ce,kd,csc+ce; all: ce and every one that compares with a teacher
    #[arg(long, value_delimiter = ',', value_name = "M,M")]
    pub(crate) methods: Option<Vec<String>>,
    /// Products of training's convolutions, as --set train.precision=...; bf16 needs a processor that has it
    #[arg(long, value_name = "f32|bf16", hide_possible_values = true, value_parser = Precision::ALL.map(Precision::name))]
    pub(crate) precision: Option<String>,
    #[command(flatten)]
    pub(crate) device: DeviceArgs,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  cargo xtask reproduce
  cargo xtask reproduce --dry-run
  cargo xtask reproduce --recipe camvid-quick --data-root ../shared/camvid
  cargo xtask reproduce --recipe cityscapes --data-root DIR --dry-run
  cargo xtask reproduce --methods all --seeds 0,1,2
  cargo xtask reproduce --recipe my.toml --methods ce,csc+ce --seeds 0,1,2 --resume")]
pub(crate) struct Reproduce {
    #[command(flatten)]
    pub(crate) recipe: RecipeArgs,
    /// Go on at the first unfinished stage, from its last checkpoint
    #[arg(long)]
    pub(crate) resume: bool,
    /// Print the plan with parameters, MACs and estimated time, and stop
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Print the results as JSON on stdout
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  cargo xtask sweep --method csc --vary csc.weight=1,10,100 --seeds 0,1,2
  cargo xtask sweep --method kd --vary kd.weight=0.1,1 --vary kd.temperature=1,4 --dry-run

The teacher is trained once. Every point of the grid is a student a seed; `ce` is trained beside them. The results are
those of `reproduce`, with report/sweep.csv beside them.")]
pub(crate) struct Sweep {
    #[command(flatten)]
    pub(crate) recipe: RecipeArgs,
    /// Objective to vary, such as csc or kd
    #[arg(long, value_name = "METHOD")]
    pub(crate) method: String,
    /// A setting of one of its terms and the values it takes; repeated, the grid of all of them
    #[arg(long, value_name = "TERM.SETTING=V,V")]
    pub(crate) vary: Vec<String>,
    /// Go on at the first unfinished stage, from its last checkpoint
    #[arg(long)]
    pub(crate) resume: bool,
    /// Print the plan with parameters, MACs and estimated time, and stop
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Print the results as JSON on stdout
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  cargo xtask train --recipe toy --stage teacher
  cargo xtask train --recipe toy --stage csc+ce --seeds 1")]
pub(crate) struct Train {
    #[command(flatten)]
    pub(crate) recipe: RecipeArgs,
    /// Stage to train: teacher or a method such as ce
    #[arg(long, value_name = "STAGE")]
    pub(crate) stage: String,
    /// Go on from the stage's last checkpoint
    #[arg(long)]
    pub(crate) resume: bool,
    /// Print the outcome as JSON on stdout
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  cargo xtask eval --model runs/toy/csc+ce/seed-0 --split test
  cargo xtask eval --model runs/camvid-quick/teacher --split val --data-root ../shared/camvid
  cargo xtask eval --predictions OUT --labels ../shared/camvid/valannot --dataset camvid --out report
  cargo xtask eval --predictions OUT --labels DIR/gtFine/val --dataset cityscapes

Label images hold the values of the data set's label files, as `predict` writes them: of Cityscapes label ids, not train
ids. Both folders may then hold city folders; a prediction's name begins with CITY_SEQUENCE_FRAME.")]
pub(crate) struct Eval {
    /// Stage folder of a run; folders that `weights import` wrote are scored by `weights verify`
    #[arg(long, value_name = "DIR", conflicts_with_all = ["predictions", "labels", "dataset"], required_unless_present = "predictions")]
    pub(crate) model: Option<PathBuf>,
    /// Split to evaluate (train, val, test); default: val. With --predictions only a name for the report
    #[arg(long, value_name = "SPLIT")]
    pub(crate) split: Option<String>,
    /// Folder of the data set; default: the run's own
    #[arg(long, value_name = "DIR")]
    pub(crate) data_root: Option<PathBuf>,
    /// Folder of predicted label PNGs, one a label image, same file name; overlays of `predict` are passed over
    #[arg(long, value_name = "DIR", requires_all = ["labels", "dataset"])]
    pub(crate) predictions: Option<PathBuf>,
    /// Folder of ground-truth label PNGs
    #[arg(long, value_name = "DIR")]
    pub(crate) labels: Option<PathBuf>,
    /// Data set whose classes the labels hold
    #[arg(long, value_name = "NAME")]
    pub(crate) dataset: Option<String>,
    /// Predictions hold train ids (0 to 18, void 255) in place of the label ids of Cityscapes' files
    #[arg(long, requires = "predictions")]
    pub(crate) train_ids: bool,
    /// Folder for summary.json, per_class.csv, confusion.csv and a report page; nothing is written without it
    #[arg(long, value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) device: DeviceArgs,
    /// Print the scores as JSON on stdout
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  cargo xtask predict --model runs/toy/csc+ce/seed-0 --out predicted street.png
  cargo xtask predict --model runs/camvid-quick/teacher --out predicted ../shared/camvid/val
  cargo xtask predict --model teacher --out predicted DIR/leftImg8bit/val/*
  cargo xtask predict --model imported --tensor images.safetensors --save-logits logits.safetensors

--tensor reads the tensor images_nchw, [n, 3, h, w], normalised already, and writes logits_nchw at the same size.")]
pub(crate) struct Predict {
    /// Stage folder of a run, or a folder that `weights import` wrote
    #[arg(long, value_name = "DIR")]
    pub(crate) model: PathBuf,
    /// Images, or folders of images (PNG, JPEG)
    #[arg(required_unless_present = "tensor", conflicts_with = "tensor", value_name = "IMAGE|DIR")]
    pub(crate) images: Vec<PathBuf>,
    /// Folder for NAME.png (values of the data set's label files) and NAME_overlay.png
    #[arg(long, required_unless_present = "tensor", conflicts_with = "tensor", value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,
    /// Normalised images as one tensor, in place of image files
    #[arg(long, requires = "save_logits", value_name = "FILE.safetensors")]
    pub(crate) tensor: Option<PathBuf>,
    /// Also write the logits at image resolution, one tensor an image
    #[arg(long, value_name = "FILE.safetensors")]
    pub(crate) save_logits: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) device: DeviceArgs,
    /// Print what was written as JSON on stdout
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  cargo xtask report runs/toy
  cargo xtask report runs/toy runs/toy-wide --out compared")]
pub(crate) struct Report {
    /// Run folders; one is written into its own report/ folder
    #[arg(required = true, value_name = "RUN")]
    pub(crate) runs: Vec<PathBuf>,
    /// Folder of the report; needed for more than one run
    #[arg(long, value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,
    /// Print the rows as JSON on stdout
    #[arg(long)]
    pub(crate) json: bool,
}

/// Which data set.
#[derive(Clone, Debug, Args)]
pub(crate) struct DatasetArgs {
    /// Data set: camvid, cityscapes or street-scenes
    #[arg(long, value_name = "NAME")]
    pub(crate) dataset: String,
    /// Folder of the data set; default: $SEGDISTILL_DATA_DIR/NAME
    #[arg(long, value_name = "DIR")]
    pub(crate) data_root: Option<PathBuf>,
    /// Splits; default: all
    #[arg(long, value_delimiter = ',', value_name = "SPLIT,SPLIT")]
    pub(crate) splits: Option<Vec<String>>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Data {
    /// Counts, pairs, sizes and label values against the manifest; exit code 3 when something differs
    #[command(
        after_help = "Examples:\n  cargo xtask data check --dataset camvid --data-root ../shared/camvid\n  cargo xtask data check --dataset cityscapes --data-root DIR"
    )]
    Check {
        #[command(flatten)]
        dataset: DatasetArgs,
        /// Print the findings as JSON on stdout
        #[arg(long)]
        json: bool,
    },
    /// Class histogram, images a class appears in, class weights, RGB mean and deviation
    #[command(
        after_help = "Example:\n  cargo xtask data stats --dataset camvid --data-root ../shared/camvid --splits train"
    )]
    Stats {
        #[command(flatten)]
        dataset: DatasetArgs,
        /// Print the figures as JSON on stdout
        #[arg(long)]
        json: bool,
    },
    /// A sheet of images, labels and overlays as one PNG
    #[command(after_help = "Example:\n  cargo xtask data preview --dataset street-scenes --out scenes.png")]
    Preview {
        #[command(flatten)]
        dataset: DatasetArgs,
        /// PNG to write
        #[arg(long, value_name = "FILE.png")]
        out: PathBuf,
        /// Images on the sheet
        #[arg(long, default_value_t = 8, value_name = "N")]
        count: usize,
    },
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  cargo xtask bench --list                                       what there is
  cargo xtask bench --filter resnet34/encoder.layer1             ours alone
  cargo xtask bench --peer .venv/bin/python --filter conv-dense  beside PyTorch, round by round
  cargo xtask bench --peer .venv/bin/python --json run.json --record benches/record
  cargo xtask bench --from run.json --plot docs/images/csc-growth.svg

Ratios are our time over the peer's fastest layout of the same precision: below 1 we are faster. Keep the machine
quiet: both sides want every core.")]
pub(crate) struct Bench {
    /// A Python with torch, to compare with; without it only our side runs
    #[arg(long, value_name = "PYTHON")]
    pub(crate) peer: Option<PathBuf>,
    /// Part of a case's name, or a group such as conv-depthwise; may be repeated
    #[arg(long, value_name = "NAME")]
    pub(crate) filter: Vec<String>,
    /// Print the cases and stop
    #[arg(long)]
    pub(crate) list: bool,
    /// Rounds of each case; the sides take turns, and the median counts
    #[arg(long, default_value_t = 5, value_name = "N")]
    pub(crate) rounds: usize,
    /// Least milliseconds of a round: short cases run many times in it
    #[arg(long, default_value_t = 200.0, value_name = "MS", hide = true)]
    pub(crate) round_ms: f64,
    /// Arithmetic of our convolutions: f32, or bf16 where the processor has it
    #[arg(long, default_value = "f32", value_name = "f32|bf16")]
    pub(crate) precision: String,
    /// Layouts the peer runs
    #[arg(long, value_delimiter = ',', default_value = "nchw,nhwc,bf16", value_name = "L,L")]
    pub(crate) layouts: Vec<String>,
    /// Threads on both sides; default: RAYON_NUM_THREADS, else every core
    #[arg(long, value_name = "N")]
    pub(crate) threads: Option<usize>,
    /// Longest wait for one answer of either side, in seconds
    #[arg(long, default_value_t = 600, value_name = "SECONDS")]
    pub(crate) timeout: u64,
    /// Write every figure and raw round as JSON
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    /// Read earlier figures instead of measuring; several files are joined, the later ones win
    #[arg(long, value_name = "FILE")]
    pub(crate) from: Vec<PathBuf>,
    /// Write the record DIR/PROCESSOR/DATE.md
    #[arg(long, value_name = "DIR")]
    pub(crate) record: Option<PathBuf>,
    /// Date of the record; default: today, UTC
    #[arg(long, value_name = "YYYY-MM-DD")]
    pub(crate) date: Option<String>,
    /// Draw time and memory of the CSC forms over the number of pixels
    #[arg(long, value_name = "FILE.svg")]
    pub(crate) plot: Option<PathBuf>,
    /// Be the process that is measured
    #[arg(long, hide = true)]
    pub(crate) worker: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Models {
    /// Published networks and every network on every encoder, with parameters and MACs
    #[command(after_help = "Example:\n  cargo xtask models list --json")]
    List {
        /// Published networks alone
        #[arg(long)]
        published: bool,
        /// Input size the MACs are counted at; default: each network's published size, else 512x512
        #[arg(long, value_name = "HxW")]
        size: Option<String>,
        /// Number of classes; default: each network's published number, else 19
        #[arg(long, value_name = "N")]
        classes: Option<usize>,
        /// Print as JSON on stdout
        #[arg(long)]
        json: bool,
    },
    /// One network: parameters, MACs, output stride, taps with shapes
    #[command(
        after_help = "Example:\n  cargo xtask models describe deeplabv3plus-resnet34 --size 360x480 --classes 11"
    )]
    Describe(Describe),
    /// Figures of docs/networks.md: block diagrams of networks and the parts they are made of, as SVG
    #[command(after_help = "Example:\n  cargo xtask models draw --out docs/images/networks")]
    Draw {
        /// Folder the figures go to
        #[arg(long, default_value = "docs/images/networks", value_name = "DIR")]
        out: std::path::PathBuf,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Describe {
    /// Network, as `models list` names it, or NETWORK-ENCODER
    pub(crate) name: String,
    /// Input size; default: the published one, else 512x512
    #[arg(long, value_name = "HxW")]
    pub(crate) size: Option<String>,
    /// Number of classes; default: the published number, else 19
    #[arg(long, value_name = "N")]
    pub(crate) classes: Option<usize>,
    /// Width multiplier
    #[arg(long, value_name = "F")]
    pub(crate) width: Option<f64>,
    /// Output stride, 8 or 16
    #[arg(long, value_name = "N")]
    pub(crate) output_stride: Option<usize>,
    /// Layout, such as paper or smp
    #[arg(long, value_name = "NAME")]
    pub(crate) layout: Option<String>,
    /// With the auxiliary head
    #[arg(long)]
    pub(crate) aux: bool,
    /// Print as JSON on stdout
    #[arg(long)]
    pub(crate) json: bool,
}
