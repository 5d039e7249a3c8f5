//! Published networks by name: structure, classes and input size together, as their sources state parameters and
//! multiply-accumulates.
//!
//! Names are `SOURCE/NETWORK-ENCODER`, then what differs from the source's first statement: `+no-aux`, `+11-classes`,
//! `+1024x2048`. `encoder/NAME` is an encoder alone, without its classifier.

use crate::encoders::{EncoderOptions, plan as encoder_plan};
use crate::error::Result;
use crate::segmenter::{info, trace};
use crate::spec::{ModelSpec, PAPER};

/// What a [`Configuration`] is of.
#[derive(Clone, Debug, PartialEq)]
pub enum Subject {
    /// A whole network.
    Network(ModelSpec),
    /// An encoder alone, at full width and its own strides.
    Encoder(&'static str),
}

/// A published network with the input size its cost is stated for.
#[derive(Clone, Debug, PartialEq)]
pub struct Configuration {
    /// Its name here.
    pub name: String,
    /// What it is.
    pub subject: Subject,
    /// Height and width of the image its multiply-accumulates are counted for.
    pub input_hw: [usize; 2],
}

/// Trained elements and multiply-accumulates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cost {
    /// Trained elements, running statistics left out, an auxiliary head included where the configuration has one.
    pub n_parameters: usize,
    /// Multiply-accumulates of convolutions and linear layers; those of an auxiliary head too, as the sources state.
    pub macs: u64,
    /// Multiply-accumulates of attention's two products, which `macs` leaves out.
    pub attention_macs: u64,
}

/// The linear layers of an image classifier, behind its encoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClassifierCost {
    /// Trained elements.
    pub n_parameters: usize,
    /// Multiply-accumulates of an image.
    pub macs: u64,
}

impl Configuration {
    /// The classifier for ImageNet's 1000 classes that an encoder alone was published with: what published counts of
    /// encoders include and [`Configuration::cost`] does not. `None` for whole networks and for U-Net's path, which was
    /// never a classifier.
    ///
    /// # Errors
    /// `Unknown` for an encoder that does not exist.
    pub fn classifier(&self) -> Result<Option<ClassifierCost>> {
        const CLASSES: usize = 1000;
        let Subject::Encoder(name) = self.subject else { return Ok(None) };
        let deepest = encoder_plan(name, EncoderOptions::default())?.taps().last().map_or(0, |tap| tap.channels);
        let widths = match name {
            _ if name.starts_with("unet") => return Ok(None),
            // On a map of 7 x 7.
            _ if name.starts_with("vgg") => vec![49 * deepest, 4096, 4096, CLASSES],
            _ => vec![deepest, CLASSES],
        };
        let layers = || widths.windows(2).map(|pair| (pair[0], pair[1]));
        Ok(Some(ClassifierCost {
            n_parameters: layers().map(|(n_in, n_out)| n_in * n_out + n_out).sum(),
            macs: layers().map(|(n_in, n_out)| (n_in * n_out) as u64).sum(),
        }))
    }

    /// What it costs.
    ///
    /// # Errors
    /// As [`info`] and [`trace`].
    pub fn cost(&self) -> Result<Cost> {
        match &self.subject {
            Subject::Network(spec) => {
                let trace = trace(spec, self.input_hw)?;
                Ok(Cost {
                    n_parameters: info(spec)?.n_parameters,
                    macs: trace.macs + trace.aux_macs,
                    attention_macs: trace.attention_macs,
                })
            }
            Subject::Encoder(name) => {
                let plan = encoder_plan(name, EncoderOptions::default())?;
                let trace = plan.trace(self.input_hw)?;
                Ok(Cost { n_parameters: plan.n_parameters(), macs: trace.macs, attention_macs: trace.attention_macs })
            }
        }
    }
}

/// One source's way to build its networks.
struct Source {
    name: &'static str,
    layout: &'static str,
    output_stride: usize,
    aux: bool,
    n_classes: usize,
    input_hw: [usize; 2],
}

impl Source {
    fn network(&self, network: &str, encoder: &str) -> Configuration {
        let spec = ModelSpec {
            layout: self.layout.to_string(),
            output_stride: self.output_stride,
            aux: self.aux,
            ..ModelSpec::new(network, encoder, self.n_classes)
        };
        let name = format!("{}/{}", self.name, spec.full_name());
        Configuration { name, subject: Subject::Network(spec), input_hw: self.input_hw }
    }
}

const CIRKD: Source =
    Source { name: "cirkd", layout: PAPER, output_stride: 8, aux: true, n_classes: 19, input_hw: [512, 1024] };
const SKD: Source = Source { name: "skd", layout: "skd", ..CIRKD };
const SMP: Source =
    Source { name: "smp", layout: "smp", output_stride: 16, aux: false, n_classes: 19, input_hw: [512, 512] };
const TORCHVISION: Source =
    Source { name: "torchvision", layout: "torchvision", output_stride: 8, n_classes: 21, ..SMP };
const PAPERS: Source = Source { name: "paper", layout: PAPER, n_classes: 11, ..SMP };

/// `configuration` and the same without its auxiliary head, for other class counts, and at another size.
fn with(configuration: Configuration, no_aux: bool, classes: &[usize], sizes: &[[usize; 2]]) -> Vec<Configuration> {
    let Configuration { name, subject: Subject::Network(spec), input_hw } = &configuration else {
        return vec![configuration];
    };
    let variant = |suffix: String, spec: ModelSpec, input_hw: [usize; 2]| Configuration {
        name: format!("{name}+{suffix}"),
        subject: Subject::Network(spec),
        input_hw,
    };
    let plain = no_aux.then(|| variant("no-aux".into(), ModelSpec { aux: false, ..spec.clone() }, *input_hw));
    let classes = classes
        .iter()
        .map(|&n_classes| variant(format!("{n_classes}-classes"), ModelSpec { n_classes, ..spec.clone() }, *input_hw));
    let sizes = sizes.iter().map(|&hw| variant(format!("{}x{}", hw[0], hw[1]), spec.clone(), hw));
    let variants: Vec<Configuration> = plain.into_iter().chain(classes).chain(sizes).collect();
    std::iter::once(configuration).chain(variants).collect()
}

/// Every published network there is.
///
/// # Example
/// ```
/// use segdistill_models::configurations;
/// let all = configurations();
/// let student = all.iter().find(|c| c.name == "cirkd/pspnet-resnet18-deep").unwrap();
/// assert_eq!(student.cost().unwrap().n_parameters, 12_919_334);
/// ```
pub fn configurations() -> Vec<Configuration> {
    let mut all = Vec::new();
    let city = [[1024, 2048]];
    for (network, encoder) in
        [("deeplabv3", "resnet101-deep"), ("deeplabv3", "resnet18-deep"), ("pspnet", "resnet18-deep")]
    {
        all.extend(with(CIRKD.network(network, encoder), true, &[11], &city));
    }
    let no_aux = Source { aux: false, ..CIRKD };
    all.extend(with(no_aux.network("deeplabv3", "mobilenetv2"), false, &[11], &city));
    for encoder in ["resnet101-deep", "resnet18-deep"] {
        all.extend(with(SKD.network("pspnet", encoder), true, &[], &[]));
    }

    let voc = Source { n_classes: 21, ..PAPERS };
    for network in ["fcn32s", "fcn16s", "fcn8s"] {
        all.extend(with(voc.network(network, "vgg16"), false, &[11], &[]));
    }
    let camvid = Source { input_hw: [360, 480], ..PAPERS };
    all.extend(with(camvid.network("segnet", "vgg16-bn"), false, &[19], &[]));
    all.extend(["unet", "unet-bn", "unet-bn-bias"].map(|encoder| PAPERS.network("unet", encoder)));
    for encoder in ["resnet18", "resnet34", "xception65"] {
        all.extend(with(PAPERS.network("deeplabv3plus", encoder), false, &[19], &[]));
    }
    let ade = Source { n_classes: 19, ..PAPERS };
    all.extend((0..6).map(|size| ade.network("segformer", &format!("mit-b{size}"))));

    for encoder in ["resnet18", "resnet34", "resnet101", "mobilenetv2", "xception41", "xception65"] {
        all.extend(with(SMP.network("deeplabv3plus", encoder), false, &[11], &[]));
    }
    all.extend(["resnet18", "resnet34"].map(|encoder| SMP.network("unet", encoder)));
    let at_8 = Source { output_stride: 8, ..SMP };
    all.push(at_8.network("deeplabv3", "resnet18"));
    all.push(SMP.network("pspnet", "resnet34"));
    all.push(Source { layout: PAPER, ..SMP }.network("segformer", "mit-b0"));
    for (network, encoder) in
        [("fcn", "resnet50"), ("fcn", "resnet101"), ("deeplabv3", "resnet50"), ("deeplabv3", "resnet101")]
    {
        all.push(TORCHVISION.network(network, encoder));
    }

    let encoder = |name: &'static str, side: usize| Configuration {
        name: format!("encoder/{name}"),
        subject: Subject::Encoder(name),
        input_hw: [side; 2],
    };
    all.extend(crate::encoders::names().into_iter().map(|name| {
        // Xception's cost is stated at the size it is trained on.
        encoder(name, if name.starts_with("xception") { 299 } else { 224 })
    }));
    all
}
