//! Numbers that move over a run: the learning rate and the weights of loss terms.

use crate::config::OptimConfig;
use crate::terms::ScheduleConfig;

/// Polynomial decay with linear warm-up: `lr * min(1, (t + 1) / warmup) * (1 - t / steps)^power`.
#[derive(Clone, Copy, Debug)]
pub struct PolySchedule {
    lr: f64,
    power: f64,
    warmup: u64,
    steps: u64,
}

impl PolySchedule {
    /// The schedule of `optim` over `steps`.
    pub fn new(optim: &OptimConfig, steps: u64) -> Self {
        Self { lr: optim.lr, power: optim.poly_power, warmup: optim.warmup_steps, steps }
    }

    /// Learning rate of step `t`, from 0.
    pub fn at(&self, t: u64) -> f64 {
        let warm = if self.warmup == 0 { 1.0 } else { ((t + 1) as f64 / self.warmup as f64).min(1.0) };
        let left = (1.0 - t as f64 / self.steps as f64).max(0.0);
        self.lr * warm * left.powf(self.power)
    }
}

/// Weight of one loss term over the run.
#[derive(Clone, Copy, Debug)]
pub struct WeightSchedule {
    weight: f64,
    kind: ScheduleConfig,
    steps: u64,
}

impl WeightSchedule {
    /// `weight` moved by `kind` over `steps`.
    pub fn new(weight: f64, kind: ScheduleConfig, steps: u64) -> Self {
        Self { weight, kind, steps }
    }

    /// Weight at step `t`, from 0; a ramp up starts above 0, so that the term has a gradient from the first step.
    pub fn at(&self, t: u64) -> f64 {
        let done = t as f64 / self.steps as f64;
        self.weight
            * match self.kind {
                ScheduleConfig::Constant => 1.0,
                ScheduleConfig::RampUp => ((t + 1) as f64 / self.steps as f64 * 10.0).min(1.0),
                ScheduleConfig::RampDown => (1.0 - done).max(0.0),
            }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn poly_warms_up_then_decays() {
        let optim = OptimConfig {
            lr: 0.1,
            momentum: 0.9,
            nesterov: false,
            weight_decay: 0.0,
            decay_all: false,
            poly_power: 0.9,
            warmup_steps: 10,
            clip_norm: 0.0,
        };
        let s = PolySchedule::new(&optim, 100);
        assert!((s.at(0) - 0.01).abs() < 1e-12);
        assert!((s.at(4) - 0.05 * 0.96f64.powf(0.9)).abs() < 1e-12);
        assert!((s.at(50) - 0.1 * 0.5f64.powf(0.9)).abs() < 1e-12);
        assert!(s.at(99) > 0.0 && s.at(100) == 0.0);
    }

    #[test]
    fn term_weights_follow_their_schedule() {
        let at = |kind, t| WeightSchedule::new(4.0, kind, 100).at(t);
        assert_eq!([at(ScheduleConfig::Constant, 0), at(ScheduleConfig::Constant, 99)], [4.0, 4.0]);
        let up = |t| at(ScheduleConfig::RampUp, t);
        assert_eq!([up(0), up(4), up(9), up(50)], [0.4, 2.0, 4.0, 4.0]);
        assert_eq!([at(ScheduleConfig::RampDown, 0), at(ScheduleConfig::RampDown, 75)], [4.0, 1.0]);
    }
}
