//! The catalogue: every case at the real shapes, and how some of them are chosen by name.

use segdistill_models::ModelSpec;
use segdistill_models::layers::ConvShape;

use crate::case::{Case, Form, Group, Layout, LossKind, Relation, Work};
use crate::error::{BenchError, Result};
use crate::layers::{Layer, distinct, layers};

/// Batch of training and of every single operation: CamVid at full size, cut to a multiple of 16.
pub const TRAIN: [usize; 4] = [4, 3, 352, 480];
/// Batch of inference: one image of CamVid.
pub const INFERENCE: [usize; 4] = [1, 3, 360, 480];
/// Classes of CamVid.
pub const CLASSES: usize = 11;
/// Maps of logits that losses between networks compare, at stride 4: CamVid's of the training step, and Cityscapes' of
/// eight crops of 512 x 1024.
pub const LOGITS: [[usize; 4]; 2] = [[TRAIN[0], CLASSES, 88, 120], [8, 19, 128, 256]];
/// Features of four crops of 512 x 1024 at stride 8.
pub const FEATURES: [usize; 4] = [4, 128, 64, 128];

/// Every case.
///
/// # Errors
/// None with the encoders named here; `Model` otherwise.
pub fn cases() -> Result<Vec<Case>> {
    let mut all = Vec::new();
    for encoder in ["resnet34", "xception65"] {
        let layers = layers(encoder, [TRAIN[2], TRAIN[3]], CLASSES)?;
        for (layer, repeats) in distinct(&layers) {
            all.push(conv(encoder, &layer, repeats)?);
        }
    }
    all.extend(operations());
    for classes in [11, 19] {
        // Grids of CamVid's and Cityscapes' logits at strides 16, 8, 4, 2 and of crops; the copied map has a size
        // that the pixel pairs of the oracle still allow.
        let grids = [
            ([23, 30], 690),
            ([45, 60], 2700),
            ([90, 120], 2700),
            ([180, 240], 2700),
            ([256, 512], 2048),
            ([512, 1024], 2048),
        ];
        for (form, most) in [(Form::Letter, 10_800), (Form::Direct, 43_200), (Form::Linear, usize::MAX)] {
            for (hw, source) in grids {
                if hw[0] * hw[1] <= most {
                    all.push(csc(form, classes, hw, source));
                }
            }
        }
    }
    for kind in LossKind::OF_LOGITS {
        all.extend(LOGITS.map(|input| loss(kind, input)));
    }
    all.extend(LossKind::OF_FEATURES.map(|kind| loss(kind, FEATURES)));
    all.extend(relations());
    for encoder in ["resnet18", "resnet34", "xception65"] {
        all.push(network(encoder, true)?);
        all.push(network(encoder, false)?);
    }
    all.sort_by_key(|case| case.group);
    Ok(all)
}

fn conv(network: &str, layer: &Layer, repeats: usize) -> Result<Case> {
    let ConvShape { n_in, stride, dilation, depthwise, bias, .. } = layer.shape;
    let [h, w] = layer.hw;
    let image = n_in == 3;
    let macs = TRAIN[0] as u64 * layer.shape.macs(layer.hw)?.0;
    let group = match (image, depthwise) {
        (true, _) => Group::ConvStem,
        (_, true) => Group::ConvDepthwise,
        _ => Group::ConvDense,
    };
    Ok(Case {
        name: format!("{network}/{}", layer.name),
        group,
        work: Work::Conv {
            input: [TRAIN[0], n_in, h, w],
            weight: layer.shape.weight_shape(),
            stride,
            padding: layer.shape.config().padding[0],
            dilation,
            groups: layer.shape.config().groups,
            bias,
            image,
        },
        // Forward, the weight's gradient, and the input's where it has one: each two a multiply-add.
        flop: macs * if image { 4 } else { 6 },
        repeats,
        layouts: Layout::ALL.to_vec(),
        needs_mib: 0,
    })
}

fn operations() -> Vec<Case> {
    let n = TRAIN[0];
    let case = |name: &str, work, layouts: &[Layout]| Case {
        name: name.to_string(),
        group: Group::Op,
        work,
        flop: 0,
        repeats: 1,
        layouts: layouts.to_vec(),
        needs_mib: 0,
    };
    let all = &Layout::ALL;
    let f32_only = &[Layout::Nchw, Layout::Nhwc];
    let norm = |name: &str, [c, h, w]: [usize; 3], residual, relu| {
        case(name, Work::BatchNorm { input: [n, c, h, w], residual, relu }, all)
    };
    let resize =
        |name: &str, input, to, align_corners, layouts| case(name, Work::Resize { input, to, align_corners }, layouts);
    vec![
        norm("resnet34/encoder.bn1", [64, 176, 240], false, true),
        norm("resnet34/encoder.layer1.0.bn1", [64, 88, 120], false, true),
        norm("resnet34/encoder.layer1.0.bn2", [64, 88, 120], true, true),
        norm("resnet34/encoder.layer4.0.bn2", [512, 22, 30], true, true),
        norm("resnet34/decoder.fuse.0.bn", [256, 88, 120], false, true),
        norm("xception65/encoder.blocks.3.stack.conv1.bn_dw", [728, 22, 30], false, false),
        case("resnet34/encoder.relu", Work::Relu { input: [n, 64, 176, 240] }, all),
        case("resnet34/encoder.layer4.0.relu", Work::Relu { input: [n, 512, 22, 30] }, all),
        case("resnet34/encoder.maxpool", Work::MaxPool { input: [n, 64, 176, 240] }, all),
        resize("resnet34/decoder.raise", [n, 256, 22, 30], [88, 120], true, all),
        resize("resnet34/logits-to-labels", [n, CLASSES, 88, 120], [TRAIN[2], TRAIN[3]], false, f32_only),
        case("resnet34/cross-entropy", Work::CrossEntropy { input: [n, CLASSES, TRAIN[2], TRAIN[3]] }, f32_only),
        case("resnet34/sgd", Work::Sgd { encoder: "resnet34".into(), classes: CLASSES }, &[Layout::Nchw]),
    ]
}

fn csc(form: Form, classes: usize, hw: [usize; 2], source: usize) -> Case {
    let pixels = hw[0] * hw[1];
    let name = match form {
        Form::Letter => "letter",
        Form::Direct => "direct",
        Form::Linear => "linear",
    };
    // The letter's matrices hold all pairs of pixels: the peer keeps about six of them, candle about twelve.
    let matrix_mib = (pixels * pixels * 4) as u64 >> 20;
    let peer_fits = pixels <= 10_800;
    let ours = if form == Form::Letter { 12 } else { 0 };
    Case {
        name: format!("csc/{name}-{classes}c-{pixels}"),
        group: Group::Csc,
        work: Work::Csc { form, classes, hw, source },
        flop: 0,
        repeats: 1,
        layouts: if peer_fits { vec![Layout::Nchw] } else { Vec::new() },
        needs_mib: matrix_mib * (ours + if peer_fits { 6 } else { 0 }),
    }
}

fn loss(kind: LossKind, input: [usize; 4]) -> Case {
    let [n, c, h, w] = input;
    Case {
        name: format!("{}/{c}c-{n}x{h}x{w}", kind.name()),
        group: Group::Loss,
        work: Work::Loss { loss: kind, input },
        flop: 0,
        repeats: 1,
        layouts: vec![Layout::Nchw],
        needs_mib: 0,
    }
}

/// Features of a ResNet-18 student and a ResNet-101 teacher at stride 8: of a Cityscapes crop of 512 x 1024 for CIRKD,
/// and of a whole image for SKD.
fn relations() -> Vec<Case> {
    let case = |name: &str, loss, input, slots, needs_mib| Case {
        name: name.to_string(),
        group: Group::Relations,
        work: Work::Relation { loss, input, teacher_channels: 256, slots, source: 256 },
        flop: 0,
        repeats: 1,
        layouts: vec![Layout::Nchw],
        needs_mib,
    };
    vec![
        case("pair-similarity", Relation::PairSimilarity, [1, 128, 128, 256], 0, 0),
        // The peer keeps two matrices of 8192 x 8192 for each of 16 pairs of images, and some more for one.
        case("cirkd-mini-batch", Relation::CirkdMiniBatch, [4, 128, 64, 128], 0, 34 * 256 + 2048),
        case("memory-contrast", Relation::MemoryContrast, [4, 256, 64, 128], 4104, 5 * 513 + 512),
    ]
}

fn network(encoder: &str, train: bool) -> Result<Case> {
    let spec = ModelSpec::deeplabv3plus(encoder, CLASSES);
    let input = if train { TRAIN } else { INFERENCE };
    let hw = [input[2], input[3]];
    let macs = input[0] as u64 * segdistill_models::macs(&spec, hw)?;
    // The first layer forms no gradient of the image.
    let first = &layers(encoder, hw, CLASSES)?[0];
    let unneeded = 2 * input[0] as u64 * first.shape.macs(hw)?.0;
    let (encoder, classes) = (encoder.to_string(), CLASSES);
    let (name, group, work, flop) = match train {
        true => (
            format!("{encoder}/train-step"),
            Group::Train,
            Work::Train { encoder, input, classes },
            6 * macs - unneeded,
        ),
        false => {
            (format!("{encoder}/inference"), Group::Inference, Work::Inference { encoder, input, classes }, 2 * macs)
        }
    };
    Ok(Case { name, group, work, flop, repeats: 1, layouts: Layout::ALL.to_vec(), needs_mib: 0 })
}

/// The cases whose name contains one of `filters`, or whose group is one of them; all without a filter.
///
/// # Errors
/// `Usage` for a filter that no case meets, with the nearest names.
pub fn filtered(all: &[Case], filters: &[String]) -> Result<Vec<Case>> {
    let meets = |case: &Case, filter: &str| case.group.name() == filter || case.name.contains(filter);
    for filter in filters {
        if !all.iter().any(|case| meets(case, filter)) {
            return Err(BenchError::usage(
                format!("no case is called `{filter}`, nearest: {}", nearest(all, filter).join(", ")),
                "part of a name or a whole group; `--list` prints them all",
            ));
        }
    }
    Ok(all.iter().filter(|case| filters.is_empty() || filters.iter().any(|f| meets(case, f))).cloned().collect())
}

/// Four names, groups among them, that share most neighbouring letters with `filter`.
fn nearest<'a>(all: &'a [Case], filter: &str) -> Vec<&'a str> {
    let pairs = |text: &str| -> Vec<[char; 2]> {
        let letters: Vec<char> = text.to_lowercase().chars().collect();
        letters.windows(2).map(|w| [w[0], w[1]]).collect()
    };
    let wanted = pairs(filter);
    // Dice's coefficient, counted towards the filter so that a long name is not held against a case.
    let likeness = |name: &str| {
        let found = pairs(name);
        let shared = wanted.iter().filter(|p| found.contains(p)).count();
        (shared, std::cmp::Reverse(found.len()))
    };
    let groups = Group::ALL.map(Group::name);
    let mut names: Vec<&str> = groups.into_iter().chain(all.iter().map(|case| case.name.as_str())).collect();
    names.sort_by_key(|name| std::cmp::Reverse(likeness(name)));
    names.truncate(4);
    names
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_case_has_a_name_of_its_own() {
        let all = cases().unwrap();
        let names: BTreeSet<&str> = all.iter().map(|case| case.name.as_str()).collect();
        assert_eq!(names.len(), all.len());
        for group in Group::ALL {
            assert!(all.iter().any(|case| case.group == group), "{} is empty", group.name());
        }
        for case in &all {
            let bound_by_arithmetic = !matches!(case.group, Group::Op | Group::Csc | Group::Loss | Group::Relations);
            assert_eq!(case.flop > 0, bound_by_arithmetic, "{}", case.name);
            assert!(case.repeats > 0 && !case.work.describe().is_empty(), "{}", case.name);
        }
    }

    /// The convolutions of a step, each as often as it occurs, are the step's arithmetic.
    #[test]
    fn layers_add_up_to_the_step() {
        let all = cases().unwrap();
        for network in ["resnet34", "xception65"] {
            let of = |case: &&Case| case.name.starts_with(network) && matches!(case.work, Work::Conv { .. });
            let layers: u64 = all.iter().filter(of).map(|case| case.flop * case.repeats as u64).sum();
            let step = all.iter().find(|case| case.name == format!("{network}/train-step")).unwrap();
            assert_eq!(layers, step.flop, "{network}");
        }
    }

    #[test]
    fn csc_spans_the_sizes_and_the_letter_stays_small() {
        let all = cases().unwrap();
        for classes in [11, 19] {
            for pixels in [690, 2_700, 10_800, 43_200, 131_072, 524_288] {
                let name = |form: &str| format!("csc/{form}-{classes}c-{pixels}");
                let has = |form| all.iter().any(|case| case.name == name(form));
                assert_eq!([has("letter"), has("direct"), has("linear")], [pixels <= 10_800, pixels <= 43_200, true]);
            }
        }
        let most = all.iter().map(|case| case.needs_mib).max().unwrap();
        assert!(most < 12 << 10, "{most} MiB");
    }

    #[test]
    fn a_filter_is_part_of_a_name_or_a_group() {
        let all = cases().unwrap();
        let count = |filters: &[&str]| {
            filtered(&all, &filters.iter().map(|f| f.to_string()).collect::<Vec<_>>()).unwrap().len()
        };
        assert_eq!(count(&[]), all.len());
        assert_eq!(count(&["train"]), 3);
        assert_eq!(count(&["resnet34/encoder.conv1", "resnet34/inference"]), 2);
        let error = filtered(&all, &["resnet34/encoder.layer9".into()]).unwrap_err().to_string();
        assert!(error.contains("`resnet34/encoder.layer9`") && error.contains("resnet34/encoder.layer"), "{error}");
        let error = filtered(&all, &["csc-linear".into()]).unwrap_err().to_string();
        assert!(error.contains("csc/linear-"), "{error}");
    }

    #[test]
    fn a_case_survives_json() {
        for case in cases().unwrap() {
            let text = serde_json::to_string(&case).unwrap();
            assert_eq!(serde_json::from_str::<Case>(&text).unwrap(), case, "{text}");
        }
    }
}
