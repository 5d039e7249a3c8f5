//! The convolution layers of DeepLabV3+ at an input size, written down from the published structure: what each is
//! called, its geometry, and the map it sees.
//!
//! `models` builds the networks; this list is checked against it (names, weight shapes, multiply-accumulates) by the
//! tests below.

use segdistill_models::layers::ConvShape;

use crate::error::{BenchError, Result};

/// One convolution of a network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layer {
    /// Dotted name, as its weight has it without `.weight`.
    pub name: String,
    /// Geometry.
    pub shape: ConvShape,
    /// Height and width of its input.
    pub hw: [usize; 2],
}

/// Encoders whose layers are known.
pub const ENCODERS: [&str; 3] = ["resnet18", "resnet34", "xception65"];

/// Every convolution of DeepLabV3+ with `encoder` at full width and output stride 16, in order of execution.
///
/// # Errors
/// `Usage` for an encoder outside [`ENCODERS`]; `Model` for an empty image.
pub fn layers(encoder: &str, hw: [usize; 2], classes: usize) -> Result<Vec<Layer>> {
    let mut walk = Walk(Vec::new());
    match encoder {
        "resnet18" => resnet(&mut walk, [2, 2, 2, 2], hw, classes)?,
        "resnet34" => resnet(&mut walk, [3, 4, 6, 3], hw, classes)?,
        "xception65" => xception(&mut walk, hw, classes)?,
        _ => {
            return Err(BenchError::usage(
                format!("unknown encoder `{encoder}`, known: {}", ENCODERS.join(", ")),
                "names are lower case",
            ));
        }
    }
    Ok(walk.0)
}

/// Layers of equal geometry and input, each with how often it occurs, named by the first.
pub fn distinct(layers: &[Layer]) -> Vec<(Layer, usize)> {
    let mut found: Vec<(Layer, usize)> = Vec::new();
    for layer in layers {
        match found.iter_mut().find(|(seen, _)| (seen.shape, seen.hw) == (layer.shape, layer.hw)) {
            Some((_, count)) => *count += 1,
            None => found.push((layer.clone(), 1)),
        }
    }
    found
}

struct Walk(Vec<Layer>);

impl Walk {
    /// Notes a layer and hands out the size of its output.
    fn conv(&mut self, name: impl Into<String>, shape: ConvShape, hw: [usize; 2]) -> Result<[usize; 2]> {
        let out = shape.output_hw(hw)?;
        self.0.push(Layer { name: name.into(), shape, hw });
        Ok(out)
    }

    /// Depthwise, then pointwise.
    fn separable(&mut self, name: &str, depthwise: ConvShape, n_out: usize, hw: [usize; 2]) -> Result<[usize; 2]> {
        let hw = self.conv(format!("{name}.conv_dw"), depthwise, hw)?;
        self.conv(format!("{name}.conv_pw"), ConvShape::new(depthwise.n_out, n_out, 1), hw)
    }
}

/// He et al. 2016, table 1, the last stage dilated instead of strided.
fn resnet(walk: &mut Walk, n_blocks: [usize; 4], hw: [usize; 2], classes: usize) -> Result<()> {
    let hw = walk.conv("encoder.conv1", ConvShape::new(3, 64, 7).strided(2), hw)?;
    // Pooling halves as a 3x3 convolution of stride 2 does.
    let mut hw = ConvShape::depthwise(64, 3).strided(2).output_hw(hw)?;
    let mut low_hw = hw;
    let mut n_in = 64;
    for (i, [stride, dilation]) in [[1, 1], [2, 1], [2, 1], [1, 2]].into_iter().enumerate() {
        let n_out = 64 << i;
        for b in 0..n_blocks[i] {
            let at = format!("encoder.layer{}.{b}", i + 1);
            let step = if b == 0 { stride } else { 1 };
            let conv1 = ConvShape::new(n_in, n_out, 3).strided(step).dilated(dilation);
            let inner = walk.conv(format!("{at}.conv1"), conv1, hw)?;
            let out = walk.conv(format!("{at}.conv2"), ConvShape::new(n_out, n_out, 3).dilated(dilation), inner)?;
            if b == 0 && i > 0 {
                walk.conv(format!("{at}.downsample.0"), ConvShape::new(n_in, n_out, 1).strided(step), hw)?;
            }
            (n_in, hw) = (n_out, out);
        }
        if i == 0 {
            low_hw = hw;
        }
    }
    decoder(walk, [64, 512], [low_hw, hw], false, classes)
}

/// Chen et al. 2018, figure 4: blocks of three separable convolutions, the stride in the third.
fn xception(walk: &mut Walk, hw: [usize; 2], classes: usize) -> Result<()> {
    let hw = walk.conv("encoder.stem.0.conv", ConvShape::new(3, 32, 3).strided(2), hw)?;
    let mut hw = walk.conv("encoder.stem.1.conv", ConvShape::new(32, 64, 3), hw)?;
    let (mut low_hw, mut n_in) = (hw, 64);
    let entry = [([128; 3], 2, 1), ([256; 3], 2, 1), ([728; 3], 2, 1)];
    // The exit's first block would step to stride 32: it keeps its size, and the last block is dilated.
    let exit = [([728, 1024, 1024], 1, 1), ([1536, 1536, 2048], 1, 2)];
    let blocks = entry.into_iter().chain([([728; 3], 1, 1); 16]).chain(exit);
    for (i, (outs, stride, dilation)) in blocks.enumerate() {
        let at = format!("encoder.blocks.{i}");
        if i == 1 {
            low_hw = hw;
        }
        let projected = i < 3 || i == 19;
        if projected {
            walk.conv(format!("{at}.shortcut.conv"), ConvShape::new(n_in, outs[2], 1).strided(stride), hw)?;
        }
        for (k, n_out) in outs.into_iter().enumerate() {
            let step = if k == 2 { stride } else { 1 };
            let depthwise = ConvShape::depthwise(n_in, 3).strided(step).dilated(dilation);
            hw = walk.separable(&format!("{at}.stack.conv{}", k + 1), depthwise, n_out, hw)?;
            n_in = n_out;
        }
    }
    decoder(walk, [256, 2048], [low_hw, hw], true, classes)
}

/// Pyramid and decoder of Chen et al. 2018 on the fine and the coarse map.
fn decoder(
    walk: &mut Walk,
    [low, high]: [usize; 2],
    [low_hw, high_hw]: [[usize; 2]; 2],
    separable: bool,
    classes: usize,
) -> Result<()> {
    let three = |walk: &mut Walk, name: &str, n_in: usize, dilation: usize, hw| match separable {
        true => walk.separable(name, ConvShape::depthwise(n_in, 3).dilated(dilation), 256, hw),
        false => walk.conv(format!("{name}.conv"), ConvShape::new(n_in, 256, 3).dilated(dilation), hw),
    };
    walk.conv("decoder.aspp.0.conv", ConvShape::new(high, 256, 1), high_hw)?;
    for (i, dilation) in [6, 12, 18].into_iter().enumerate() {
        three(walk, &format!("decoder.aspp.{}", i + 1), high, dilation, high_hw)?;
    }
    walk.conv("decoder.aspp.4.conv", ConvShape::new(high, 256, 1), [1, 1])?;
    walk.conv("decoder.project.conv", ConvShape::new(5 * 256, 256, 1), high_hw)?;
    walk.conv("decoder.low.conv", ConvShape::new(low, 48, 1), low_hw)?;
    three(walk, "decoder.fuse.0", 256 + 48, 1, low_hw)?;
    three(walk, "decoder.fuse.1", 256, 1, low_hw)?;
    walk.conv("decoder.classifier", ConvShape::new(256, classes, 1).with_bias(), low_hw)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use candle_core::{DType, Device};
    use segdistill_models::{ModelSpec, build, macs};
    use segdistill_ops::ParamStore;

    use super::*;

    /// Names, weight shapes and multiply-accumulates are those of the networks that `models` builds; sizes that no
    /// stride divides tell a wrong stride or padding apart.
    #[test]
    fn the_layers_are_those_of_the_networks() {
        for encoder in ENCODERS {
            let spec = ModelSpec::deeplabv3plus(encoder, 11);
            // A frozen store of nothing builds the whole network from zeros, which cost no time.
            let store = ParamStore::frozen(BTreeMap::new(), DType::F32, &Device::Cpu).unwrap();
            build(&spec, &store).unwrap();
            let weights = store.named().into_iter().filter(|p| p.tensor.rank() == 4);
            let expected: BTreeMap<_, _> = weights.map(|p| (p.name, p.tensor.dims().to_vec())).collect();
            for hw in [[352, 480], [97, 131]] {
                let layers = layers(encoder, hw, 11).unwrap();
                let found = layers.iter().map(|l| (format!("{}.weight", l.name), l.shape.weight_shape().to_vec()));
                assert_eq!(found.collect::<BTreeMap<_, _>>(), expected, "{encoder}");
                assert_eq!(layers.len(), expected.len(), "{encoder}: a name twice");
                let total: u64 = layers.iter().map(|l| l.shape.macs(l.hw).unwrap().0).sum();
                assert_eq!(total, macs(&spec, hw).unwrap(), "{encoder} at {hw:?}");
            }
        }
        assert!(layers("resnet50", [352, 480], 11).is_err());
    }

    #[test]
    fn distinct_layers_keep_their_count() {
        let all = layers("resnet34", [352, 480], 11).unwrap();
        let distinct = distinct(&all);
        assert_eq!(distinct.iter().map(|(_, count)| count).sum::<usize>(), all.len());
        let (first, count) = &distinct[1];
        // Three blocks of two equal convolutions.
        assert_eq!((first.name.as_str(), first.hw, *count), ("encoder.layer1.0.conv1", [88, 120], 6));
        assert!(distinct.len() < all.len());
    }
}
