//! The names and shapes a network expects, found by building it over nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Device};
use segdistill_ops::{ParamKind, ParamStore};

use crate::decoders;
use crate::encoders::{self, EncoderOptions};
use crate::error::Result;
use crate::segmenter::build;
use crate::spec::ModelSpec;

/// A tensor of a network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Slot {
    pub(super) shape: Vec<usize>,
    pub(super) kind: ParamKind,
}

pub(super) type Structure = BTreeMap<String, Slot>;

/// Structures found so far: building one takes the memory of the network, and reading a file asks for the same few again
/// and again.
static FOUND: Mutex<BTreeMap<String, Arc<Structure>>> = Mutex::new(BTreeMap::new());

fn remembered(key: String, find: impl FnOnce() -> Result<Structure>) -> Result<Arc<Structure>> {
    let found = || FOUND.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(structure) = found().get(&key) {
        return Ok(Arc::clone(structure));
    }
    let structure = Arc::new(find()?);
    found().insert(key, Arc::clone(&structure));
    Ok(structure)
}

fn listed(store: &ParamStore) -> Structure {
    let slot = |p: segdistill_ops::NamedParam| (p.name, Slot { shape: p.tensor.dims().to_vec(), kind: p.kind });
    store.named().into_iter().map(slot).collect()
}

/// A frozen store without tensors: whatever is built over it has stand-ins of the right shapes.
fn empty() -> Result<ParamStore> {
    Ok(ParamStore::frozen(BTreeMap::new(), DType::F32, &Device::Cpu)?)
}

/// Tensors of a network.
pub(super) fn of_network(spec: &ModelSpec) -> Result<Arc<Structure>> {
    remembered(format!("{spec:?}"), || {
        let store = empty()?;
        build(spec, &store)?;
        Ok(listed(&store))
    })
}

/// Tensors of an encoder, below `encoder.`.
pub(super) fn of_encoder(name: &str, options: EncoderOptions) -> Result<Arc<Structure>> {
    remembered(format!("{name} {options:?}"), || {
        let store = empty()?;
        encoders::plan(name, options)?.build(&store.root().pp("encoder"))?;
        Ok(listed(&store))
    })
}

/// Tensors of the whole encoder of a network, its last stages included where the network stops before them.
pub(super) fn of_whole_encoder(spec: &ModelSpec) -> Result<Arc<Structure>> {
    let options = decoders::entry(&spec.name)?.encoder_options(spec);
    of_encoder(&spec.encoder, EncoderOptions { depth: 5, ..options })
}

/// Where a number of a spec shows in a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) dimension: usize,
    /// How many times the number the dimension is.
    pub(super) times: usize,
}

/// Tensors of a network that have a dimension equal to a number of its spec, or to twice that number where none is equal,
/// each with its place; `with` gives the spec another such number.
pub(super) fn dimensions(
    spec: &ModelSpec,
    with: fn(&ModelSpec, usize) -> ModelSpec,
) -> Result<BTreeMap<String, Place>> {
    // Multiples of eight, as channels are.
    const TRIED: [usize; 2] = [56, 72];
    let [one, other] = TRIED.map(|n| of_network(&with(spec, n)));
    let (one, other) = (one?, other?);
    let places = |times: usize| -> BTreeMap<String, Place> {
        let place = |(name, slot): (&String, &Slot)| {
            let mut pairs = slot.shape.iter().zip(&other.get(name)?.shape);
            let dimension = pairs.position(|pair| pair == (&(times * TRIED[0]), &(times * TRIED[1])))?;
            Some((name.clone(), Place { dimension, times }))
        };
        one.iter().filter_map(place).collect()
    };
    let equal = places(1);
    Ok(if equal.is_empty() { places(2) } else { equal })
}

/// Names of a network that belong to its auxiliary head.
pub(super) fn aux_names(spec: &ModelSpec) -> Result<BTreeSet<String>> {
    let with = ModelSpec { aux: true, ..spec.clone() };
    if with.validate().is_err() {
        return Ok(BTreeSet::new());
    }
    let without = of_network(&ModelSpec { aux: false, ..spec.clone() })?;
    Ok(of_network(&with)?.keys().filter(|name| !without.contains_key(*name)).cloned().collect())
}
