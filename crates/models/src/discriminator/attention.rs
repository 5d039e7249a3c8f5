//! Self-attention over the positions of a map.

use candle_core::Tensor;
use segdistill_ops::{Conv2dConfig, Init, ParamKind, Scope};

use super::dual::{Affine, Dual};
use crate::error::Result;

/// Queries and keys have this share of the channels.
const SHARE: usize = 8;

/// `x + gamma * sum_j softmax_j(<q_i, k_j>) v_j`, queries, keys and values being 1x1 convolutions of `x`.
///
/// # Source
/// Zhang et al. 2019 (SAGAN), section 3. DIFFERENCE, as in SKD's code: no convolution behind the sum, and values have all
/// channels.
#[derive(Clone, Debug)]
pub(super) struct SelfAttention {
    query: Affine,
    key: Affine,
    value: Affine,
    gamma: Tensor,
}

impl SelfAttention {
    pub(super) fn new(channels: usize, scope: &Scope) -> Result<Self> {
        let conv = |name, n_out| Affine::new([channels, n_out], 1, &scope.pp(name));
        Ok(Self {
            query: conv("query", channels / SHARE)?,
            key: conv("key", channels / SHARE)?,
            value: conv("value", channels)?,
            // A gain: like those of normalisations it is not decayed.
            gamma: scope.get("gamma", &[1], ParamKind::Norm, Init::Constant(0.0))?,
        })
    }

    pub(super) fn n_parameters(channels: usize) -> usize {
        (channels + 1) * (2 * (channels / SHARE) + channels) + 1
    }

    pub(super) fn detached(&self) -> Self {
        Self {
            query: self.query.detached(),
            key: self.key.detached(),
            value: self.value.detached(),
            gamma: self.gamma.detach(),
        }
    }

    pub(super) fn forward(&self, x: &Dual) -> Result<Dual> {
        let [h, w] = x.hw()?;
        let tokens = |conv: &Affine| conv.forward(x, Conv2dConfig::default())?.linear(|map| Ok(map.flatten_from(2)?));
        let (queries_ndm, keys_ndm, values_ndm) = (tokens(&self.query)?, tokens(&self.key)?, tokens(&self.value)?);
        // A column for each query: ndj,ndi->nji
        let energy = keys_ndm.product(&queries_ndm, |k, q| Ok(k.transpose(1, 2)?.contiguous()?.matmul(q)?))?;
        let attended = values_ndm.product(&energy.softmax_columns()?, |v, weights| Ok(v.matmul(weights)?))?;
        let gained = attended.linear(|y| {
            let (n, d, _) = y.dims3()?;
            Ok(y.broadcast_mul(&self.gamma)?.reshape((n, d, h, w))?)
        })?;
        gained.plus(x)
    }
}
