//! A process killed at any moment of a save leaves a checkpoint that loads.

mod common;

use std::collections::BTreeMap;
use std::process::{Command, Stdio};
use std::time::Duration;

use candle_core::{Device, Tensor};
use segdistill_train::TermKind;
use segdistill_train::checkpoint::{self, State};

const CHILD: &str = "SEGDISTILL_TEST_SAVE_DIR";

/// A tensor set whose every element is `value`, large enough for a save to take milliseconds.
fn tensors(value: f32) -> BTreeMap<String, Tensor> {
    let t = Tensor::full(value, (1 << 20,), &Device::Cpu).unwrap();
    (0..4).map(|i| (format!("t{i}"), t.clone())).collect()
}

fn state(step: u64) -> State {
    let stage = common::stage(&[(TermKind::ce(), 1.0)]);
    State { step, validated: step, best: None, stage, teacher: None, data: "none".into(), sha256: BTreeMap::new() }
}

/// The child: saves for ever, until it is killed. Does nothing in an ordinary test run.
#[test]
fn child_saves_until_killed() {
    let Ok(dir) = std::env::var(CHILD) else { return };
    for step in 1.. {
        let t = tensors(step as f32);
        for is_best in [false, step % 3 == 0] {
            checkpoint::save(std::path::Path::new(&dir), state(step), &t, &t, &Default::default(), is_best).unwrap();
        }
    }
}

#[test]
fn a_killed_save_leaves_a_checkpoint_that_loads() {
    let dir = tempfile::tempdir().unwrap();
    let mut newest = 0;
    for round in 0..8u64 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["child_saves_until_killed", "--exact"])
            .env(CHILD, dir.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(150 + 37 * round));
        child.kill().unwrap();
        child.wait().unwrap();
        let Some(place) = checkpoint::find(dir.path(), "last").unwrap() else { continue };
        let saved = checkpoint::load(&place, &Device::Cpu).expect("the last checkpoint is whole");
        let value = saved.model["t0"].get(0).unwrap().to_scalar::<f32>().unwrap();
        assert_eq!(value, saved.state.step as f32, "tensors and state belong together");
        newest = saved.state.step.max(newest);
    }
    assert!(newest > 0, "the child saved at least once");
    // The next save sweeps what the killed ones left.
    let t = tensors(0.5);
    checkpoint::save(dir.path(), state(9999), &t, &t, &Default::default(), true).unwrap();
    let left: Vec<_> =
        fs_err::read_dir(dir.path().join("checkpoints")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["step_009999"]);
}
