//! What a step of a stage costs on this machine, measured before anything is trained.

use std::time::Instant;

use candle_core::{DType, Device, Tensor};

use segdistill_data::Batch;
use segdistill_models::{Frozen, build};
use segdistill_ops::{Mode, ParamStore, graph, rng::Stream};

use crate::config::Stage;
use crate::error::Result;
use crate::objective::{Objective, Setting};
use crate::stage::weighted;
use crate::step::StepInputs;

/// Rounds that are timed, after one that warms up.
const ROUNDS: u64 = 3;
/// Seconds after which one timed round is enough.
const SLOW: f64 = 5.0;

/// Seconds of a training step of `stage` on `n_images` crops of noise: both networks, every term with what it owns, the
/// backward pass; the fastest of three rounds, or the first where a round takes over five seconds.
///
/// Reading images and moving the student's weights come on top.
///
/// # Errors
/// What [`run_stage`](crate::run_stage) reports of the stage's settings, and `Config` where a term compares with a teacher
/// and there is none.
pub fn step_seconds(stage: &Stage, teacher: Option<&Frozen>, n_images: usize, device: &Device) -> Result<f64> {
    stage.validate()?;
    let store = ParamStore::trainable(stage.seed, DType::F32, device).with_precision(stage.precision);
    let student = build(&stage.model, &store)?;
    let teacher = teacher.filter(|_| stage.needs_teacher());
    let setting = Setting {
        steps: stage.steps,
        seed: stage.seed,
        class_weights: None,
        optim: &stage.optim,
        student: student.info(),
        teacher: teacher.map(Frozen::info),
        device,
    };
    let mut objective = Objective::new(&stage.terms, &setting)?;
    let batch = noise(stage, n_images, device)?;
    let mut fastest = f64::INFINITY;
    for step in 0..=ROUNDS {
        let clock = Instant::now();
        let mode = Mode::Train { seed: stage.seed, step };
        let terms = objective.terms(&StepInputs::forward(student.as_ref(), teacher, &batch, mode)?, 0)?;
        let losses = terms.into_iter().filter_map(|term| Some(weighted(term.loss?, term.weight)));
        drop(graph::backward_from(losses.collect::<Result<Vec<_>>>()?)?);
        objective.train_critic(0, &batch.names)?;
        device.synchronize()?;
        let seconds = clock.elapsed().as_secs_f64();
        if step > 0 {
            fastest = fastest.min(seconds);
            if seconds > SLOW {
                break;
            }
        }
    }
    Ok(fastest)
}

/// A batch of the stage's crops in which every class occurs.
fn noise(stage: &Stage, n_images: usize, device: &Device) -> Result<Batch> {
    let [h, w] = stage.input.crop;
    let mut stream = Stream::new(0, "step cost", &[]);
    let values: Vec<f32> = (0..n_images * 3 * h * w).map(|_| stream.unit() as f32).collect();
    // Cells of 32 pixels a side, so that every class has pixels on the coarsest grid, too.
    let side = 32;
    let class =
        |at: usize| (at / (h * w) + at / w % h / side * w.div_ceil(side) + at % w / side) % stage.model.n_classes;
    let labels: Vec<u8> = (0..n_images * h * w).map(|at| class(at) as u8).collect();
    Ok(Batch {
        images_nchw: Tensor::from_vec(values, (n_images, 3, h, w), device)?,
        labels_nhw: Tensor::from_vec(labels, (n_images, h, w), &Device::Cpu)?,
        names: (0..n_images).map(|i| format!("noise {i}")).collect(),
    })
}
