//! What each term computes: the maps it looks at, through what it owns, into its loss.

use std::collections::BTreeMap;

use candle_core::Tensor;

use segdistill_losses::{
    Ace, AceTarget, AttentionTransfer, BinaryCrossEntropy, ChannelKl, CrossEntropy, Csc, Dice, Dist, FeatureMse, Ifvd,
    KlNormaliser, Lovasz, MemoryContrast, MiniBatchContrast, NodeKind, NodePooling, Ohem, OmniContrast, PairNormaliser,
    PairSimilarity, PixelKl, ace, attention_transfer, binary_cross_entropy, channel_kl, cirkd_mini_batch,
    cross_entropy, csc, dice, dist, feature_mse, ifvd, lovasz_softmax, memory_contrast, ohem_cross_entropy,
    omni_contrast, pair_similarity, pixel_kl,
};
use segdistill_ops::Mode;

use super::{Objective, Own, Term};
use crate::error::{Result, TrainError};
use crate::maps::{one_hot, pool, wholly_valid};
use crate::step::StepInputs;
use crate::terms::{AceRule, KdNormaliser, Nodes, PairForm, TermKind};

impl Objective {
    /// Loss of labelled pixels at label resolution.
    fn labelled(
        &self,
        inputs: &StepInputs,
        logits_nchw: &Tensor,
        loss: impl FnOnce(&Tensor, &Tensor, &Tensor) -> segdistill_losses::Result<Tensor>,
    ) -> Result<Tensor> {
        Ok(loss(&inputs.at_labels(logits_nchw)?, &inputs.labels_nhw, &inputs.valid_nhw)?)
    }

    pub(super) fn loss(
        &mut self,
        term: &mut Term,
        inputs: &StepInputs,
        mode: Mode,
        step: u64,
        formed: &mut BTreeMap<String, Tensor>,
    ) -> Result<Tensor> {
        let Term { kind, taps, own, shared, .. } = term;
        let logits = &inputs.student.logits_nchw;
        let class_weights = || self.class_weights.clone();
        let pair = |own: &Own| inputs.pair(&taps[0], &taps[1], own.align(), mode);
        let through = |student_ndhw: &Tensor, formed: &mut BTreeMap<String, Tensor>| -> Result<Tensor> {
            let name = shared.as_ref().expect("named when the term was built");
            if let Some(there) = formed.get(name) {
                return Ok(there.clone());
            }
            let made = self.shared[name].forward(student_ndhw, mode, self.seed, step)?;
            formed.insert(name.clone(), made.clone());
            Ok(made)
        };
        let loss = match &*kind {
            TermKind::Ce { label_smoothing } => {
                let cfg = CrossEntropy { class_weights: class_weights(), label_smoothing: *label_smoothing };
                return self.labelled(inputs, logits, |z, y, v| cross_entropy(z, y, v, &cfg));
            }
            TermKind::Aux {} => {
                let cfg = CrossEntropy { class_weights: class_weights(), ..CrossEntropy::default() };
                let logits = inputs.student.aux_logits_nchw.as_ref().ok_or_else(|| {
                    TrainError::config("term `aux` has no auxiliary head", "set model.aux, or take the term out")
                })?;
                return self.labelled(inputs, logits, |z, y, v| cross_entropy(z, y, v, &cfg));
            }
            TermKind::Ohem { threshold, min_kept } => {
                let cfg = Ohem { threshold: *threshold, min_kept: *min_kept, class_weights: class_weights() };
                return self.labelled(inputs, logits, |z, y, v| ohem_cross_entropy(z, y, v, &cfg));
            }
            TermKind::Dice {} => return self.labelled(inputs, logits, |z, y, v| dice(z, y, v, &Dice::default())),
            TermKind::Lovasz { per_image } => {
                let cfg = Lovasz { per_image: *per_image, ..Lovasz::default() };
                return self.labelled(inputs, logits, |z, y, v| lovasz_softmax(z, y, v, &cfg));
            }
            TermKind::Bce {} => {
                let targets = one_hot(&inputs.labels_nhw, self.n_classes, logits)?;
                let cfg = BinaryCrossEntropy::default();
                return self.labelled(inputs, logits, |z, _, v| binary_cross_entropy(z, &targets, v, &cfg));
            }
            TermKind::Ace { target, share, temperature } => {
                let target = match target {
                    AceRule::TeacherWhereRight => AceTarget::TeacherWhereRight,
                    AceRule::Blend => AceTarget::Blend { alpha: share.unwrap_or(0.5) },
                    AceRule::Confidence => AceTarget::Confidence,
                };
                let cfg = Ace { target, temperature: *temperature, class_weights: class_weights() };
                let teacher = inputs.at_labels(&inputs.teacher()?.logits_nchw)?;
                return self.labelled(inputs, logits, |z, y, v| ace(z, &teacher, y, v, &cfg));
            }
            TermKind::Csc {} => {
                let p = pair(own)?;
                csc(&p.student_nchw, &p.teacher_nchw, &p.valid_nhw, &Csc::default())
            }
            TermKind::Kd { temperature, normaliser } => {
                let normaliser = match normaliser {
                    KdNormaliser::MeanPixel => KlNormaliser::MeanPixel,
                    KdNormaliser::ImageSum => KlNormaliser::ImageSum,
                };
                let p = pair(own)?;
                let cfg = PixelKl { temperature: *temperature, normaliser };
                pixel_kl(&p.student_nchw, &p.teacher_nchw, &p.valid_nhw, &cfg)
            }
            TermKind::Cwd { temperature, .. } => {
                let p = pair(own)?;
                channel_kl(&p.student_nchw, &p.teacher_nchw, &p.valid_nhw, &ChannelKl { temperature: *temperature })
            }
            TermKind::Dist { inter, intra, temperature } => {
                let p = pair(own)?;
                let cfg = Dist { inter: *inter, intra: *intra, temperature: *temperature };
                dist(&p.student_nchw, &p.teacher_nchw, &p.valid_nhw, &cfg)
            }
            TermKind::At { .. } => {
                let p = pair(own)?;
                attention_transfer(&p.student_nchw, &p.teacher_nchw, &p.valid_nhw, &AttentionTransfer::default())
            }
            TermKind::Fitnet { .. } => {
                let p = pair(own)?;
                feature_mse(&p.student_nchw, &p.teacher_nchw, &p.valid_nhw, &FeatureMse::fitnet())
            }
            TermKind::Mgd { .. } => {
                let p = pair(own)?;
                let generated = through(&p.student_nchw, formed)?;
                feature_mse(&generated, &p.teacher_nchw, &p.valid_nhw, &FeatureMse::mgd())
            }
            TermKind::AfDcd { pooling, patch, groups, temperature, .. } => {
                let p = pair(own)?;
                let pooled = |map: &Tensor| pool(map, *pooling);
                let (generated, teacher) = (pooled(&through(&p.student_nchw, formed)?)?, pooled(&p.teacher_nchw)?);
                let cfg = OmniContrast { patch: *patch, groups: *groups, temperature: *temperature };
                omni_contrast(&generated, &teacher, &wholly_valid(&p.valid_nhw, *pooling)?, &cfg)
            }
            TermKind::Ifvd { .. } => {
                let p = pair(own)?;
                let cfg = Ifvd { n_classes: self.n_classes };
                ifvd(&p.student_nchw, &p.teacher_nchw, &p.labels_nhw, &p.valid_nhw, &cfg)
            }
            TermKind::PairWise { nodes, patch, positions, form, .. } => {
                let p = pair(own)?;
                let (_, _, h, w) = p.student_nchw.dims4()?;
                let share = patch.unwrap_or(0.5);
                let side = |size: usize| positions.unwrap_or((size as f64 * share) as usize).max(1);
                let pooled = |kind| Some(NodePooling { kernel: [side(h), side(w)], kind });
                let nodes = match nodes {
                    Nodes::Max => pooled(NodeKind::Max),
                    Nodes::Average => pooled(NodeKind::Average),
                    Nodes::Pixels => None,
                };
                let (normaliser, detach_norm) = match form {
                    PairForm::Paper => (PairNormaliser::Paper, false),
                    PairForm::Code => (PairNormaliser::Code, true),
                };
                let cfg = PairSimilarity { nodes, normaliser, detach_norm };
                pair_similarity(&p.student_nchw, &p.teacher_nchw, &p.valid_nhw, &cfg)
            }
            TermKind::CirkdMiniBatch { temperature, pooling, .. } => {
                let p = pair(own)?;
                let cfg =
                    MiniBatchContrast { temperature: *temperature, pooling: Some(*pooling).filter(|side| *side > 1) };
                cirkd_mini_batch(&p.student_nchw, &p.teacher_nchw, &p.valid_nhw, &cfg)
            }
            TermKind::CirkdPixel { temperature, contrast, .. }
            | TermKind::CirkdRegion { temperature, contrast, .. } => {
                let p = pair(own)?;
                let Own::Memory(memory) = own else { unreachable!("built with the term") };
                memory.enqueue(&p.teacher_nchw, &p.labels_nhw, &p.valid_nhw, step)?;
                let bank = memory.sample(*contrast, step, p.student_nchw.dtype(), p.student_nchw.device())?;
                let student = through(&p.student_nchw, formed)?;
                let cfg = MemoryContrast { temperature: *temperature, ..MemoryContrast::default() };
                memory_contrast(&student, &p.teacher_nchw, &bank, &p.valid_nhw, &cfg)
            }
            TermKind::Holistic { .. } => {
                let p = pair(own)?;
                let critic = self.critic.as_mut().expect("built with the term");
                return critic.judge(&p, &inputs.images_nchw, step);
            }
        };
        Ok(loss?)
    }
}
