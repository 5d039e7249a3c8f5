//! What a run found: raw rounds, and the figures derived from them. Plain data, read and written as JSON.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::case::{Case, Group, Layout, Precision};
use crate::peak::Peak;
use crate::workload::Answer;

/// One side of one case.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// Milliseconds of each round, itself the median of the runs in it.
    pub ms: Vec<f64>,
    /// Resident memory of the process before anything was prepared, in KiB.
    pub idle_kib: u64,
    /// High-water mark while it ran, in KiB.
    pub peak_kib: u64,
    /// Numbers the sides agree in.
    pub answer: Answer,
}

impl Measured {
    /// Median of the rounds, in milliseconds.
    pub fn median_ms(&self) -> f64 {
        median(&self.ms)
    }

    /// Memory above the idle process at the peak, in MiB.
    pub fn grown_mib(&self) -> f64 {
        self.peak_kib.saturating_sub(self.idle_kib) as f64 / 1024.0
    }
}

/// One case on all sides.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CaseResult {
    /// What was run.
    pub case: Case,
    /// Our side; `None` when the case was left out.
    pub ours: Option<Measured>,
    /// The peer, by layout.
    pub peers: BTreeMap<Layout, Measured>,
    /// Why something was left out.
    pub left_out: Option<String>,
    /// Layouts of the peer that gave a wrong answer in coarser arithmetic, with what it was: they are not timed.
    #[serde(default)]
    pub wrong_peers: BTreeMap<Layout, String>,
}

impl CaseResult {
    /// Our median, in milliseconds.
    pub fn ours_ms(&self) -> Option<f64> {
        self.ours.as_ref().map(Measured::median_ms)
    }

    /// The peer's fastest layout of `precision`.
    pub fn best_peer(&self, precision: Precision) -> Option<(Layout, &Measured)> {
        let matching = self.peers.iter().filter(|(layout, _)| layout.precision() == precision);
        matching.min_by(|a, b| a.1.median_ms().total_cmp(&b.1.median_ms())).map(|(layout, m)| (*layout, m))
    }

    /// Our time over the peer's best: below 1 we are faster.
    pub fn ratio(&self, precision: Precision) -> Option<f64> {
        Some(self.ours_ms()? / self.best_peer(precision)?.1.median_ms())
    }

    /// 10^9 operations a second of our side, where operations are counted.
    pub fn gflops(&self) -> Option<f64> {
        let flop = self.case.flop;
        (flop > 0).then_some(flop as f64 / self.ours_ms()? / 1e6)
    }
}

/// Where a run took place.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// Processor as it names itself.
    pub cpu: String,
    /// Cores that the system offers.
    pub cores: usize,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Kernel.
    pub kernel: String,
    /// Vector extensions that matter here.
    pub extensions: Vec<String>,
}

/// One run of the benchmark.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// `YYYY-MM-DD`, UTC.
    pub date: String,
    /// The command as it was typed.
    pub command: String,
    /// Where.
    pub machine: Machine,
    /// Threads on both sides.
    pub threads: usize,
    /// Rounds of each case.
    pub rounds: usize,
    /// Least milliseconds of a round.
    pub least_ms: f64,
    /// Precision of our side.
    pub precision: Precision,
    /// Names and versions: ours, compiler, commit, peer.
    pub versions: BTreeMap<String, String>,
    /// Load average at the start and at the end.
    pub load: Vec<String>,
    /// Peak of f32 arithmetic.
    pub peak: Option<Peak>,
    /// Results in the order of the tables.
    pub cases: Vec<CaseResult>,
}

/// What a group comes to against the peer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// `group` or `group of network`.
    pub name: String,
    /// Cases that were compared.
    pub compared: usize,
    /// Geometric mean of the ratios.
    pub geometric_mean: f64,
    /// Largest ratio and its case.
    pub worst: (f64, String),
    /// Ratio of the sums of time, each layer as often as it occurs.
    pub total_ratio: f64,
}

impl Run {
    /// Groups that were compared, convolutions by network too, in the order of the tables.
    pub fn summaries(&self) -> Vec<Summary> {
        let mut sets: Vec<(String, Vec<&CaseResult>)> = Vec::new();
        let mut put = |name: String, result| match sets.iter_mut().find(|(n, _)| *n == name) {
            Some((_, set)) => set.push(result),
            None => sets.push((name, vec![result])),
        };
        for result in self.cases.iter().filter(|r| r.ratio(self.precision).is_some()) {
            put(result.case.group.name().into(), result);
        }
        for result in self.cases.iter().filter(|r| r.ratio(self.precision).is_some()) {
            let network = result.case.name.split('/').next().unwrap_or_default();
            if matches!(result.case.group, Group::ConvStem | Group::ConvDense | Group::ConvDepthwise) {
                put(format!("all convolutions of {network}"), result);
            }
        }
        sets.into_iter().filter_map(|(name, set)| self.summary(name, &set)).collect()
    }

    fn summary(&self, name: String, set: &[&CaseResult]) -> Option<Summary> {
        let ratios: Vec<(f64, &CaseResult)> = set.iter().filter_map(|r| Some((r.ratio(self.precision)?, *r))).collect();
        let worst = ratios.iter().max_by(|a, b| a.0.total_cmp(&b.0))?;
        let (mut ours, mut theirs) = (0.0, 0.0);
        for (_, result) in &ratios {
            let times = result.case.repeats as f64;
            ours += times * result.ours_ms()?;
            theirs += times * result.best_peer(self.precision)?.1.median_ms();
        }
        Some(Summary {
            name,
            compared: ratios.len(),
            geometric_mean: geometric_mean(ratios.iter().map(|(ratio, _)| *ratio)),
            worst: (worst.0, worst.1.case.name.clone()),
            total_ratio: ours / theirs,
        })
    }

    /// Adds the cases of `other`; a case that both have is taken from `other`.
    pub fn merge(&mut self, other: Run) {
        for result in other.cases {
            match self.cases.iter_mut().find(|r| r.case.name == result.case.name) {
                Some(mine) => *mine = result,
                None => self.cases.push(result),
            }
        }
        self.cases.sort_by_key(|r| r.case.group);
        self.versions.extend(other.versions);
        self.load.extend(other.load);
        self.peak = self.peak.into_iter().chain(other.peak).max_by(|a, b| a.gflops.total_cmp(&b.gflops));
        if other.command != self.command {
            self.command = format!("{}\n{}", self.command, other.command);
        }
    }
}

/// Median; NaN of nothing.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match (sorted.len(), sorted.len() / 2) {
        (0, _) => f64::NAN,
        (n, middle) if n % 2 == 1 => sorted[middle],
        (_, middle) => (sorted[middle - 1] + sorted[middle]) / 2.0,
    }
}

/// Geometric mean; NaN of nothing.
pub fn geometric_mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, n) = values.fold((0.0, 0), |(sum, n), v| (sum + v.ln(), n + 1));
    (sum / f64::from(n)).exp()
}

/// Slope of `ln y` over `ln x` by least squares; `None` below two different points.
pub fn log_slope(points: &[(f64, f64)]) -> Option<f64> {
    let n = points.len() as f64;
    let mean = |f: fn(&(f64, f64)) -> f64| points.iter().map(|p| f(p).ln()).sum::<f64>() / n;
    let (mx, my) = (mean(|p| p.0), mean(|p| p.1));
    let spread: f64 = points.iter().map(|p| (p.0.ln() - mx).powi(2)).sum();
    let joint: f64 = points.iter().map(|p| (p.0.ln() - mx) * (p.1.ln() - my)).sum();
    (points.len() > 1 && spread > 0.0).then_some(joint / spread)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::catalogue::cases;

    /// A run of two layers and three CSC sizes with invented times.
    pub(crate) fn invented() -> Run {
        let all = cases().unwrap();
        let measured = |ms: &[f64], mib: u64| Measured {
            ms: ms.to_vec(),
            idle_kib: 10 << 10,
            peak_kib: (10 + mib) << 10,
            answer: Answer::from([("y".to_string(), 0.5)]),
        };
        let result = |name: &str, ours: f64, peers: &[(Layout, f64)]| CaseResult {
            case: all.iter().find(|c| c.name == name).unwrap().clone(),
            ours: Some(measured(&[ours * 1.5, ours, ours * 0.9], 100)),
            peers: peers.iter().map(|&(layout, ms)| (layout, measured(&[ms, ms, ms], 200))).collect(),
            left_out: None,
            wrong_peers: BTreeMap::new(),
        };
        use Layout::{Bf16, Nchw, Nhwc};
        Run {
            date: "2001-02-03".into(),
            command: "cargo xtask bench --peer python".into(),
            machine: Machine { cpu: "Some CPU @ 2 GHz".into(), cores: 2, memory_mib: 1000, ..Default::default() },
            threads: 2,
            rounds: 3,
            least_ms: 200.0,
            precision: Precision::F32,
            versions: BTreeMap::from([("peer".to_string(), "torch 9".to_string())]),
            load: vec!["0.10 0.20 0.30".into()],
            peak: Some(Peak { gflops: 400.0, vector_bits: 512 }),
            cases: vec![
                result("resnet34/encoder.layer1.0.conv1", 8.0, &[(Nchw, 12.0), (Nhwc, 10.0), (Bf16, 2.0)]),
                result("resnet34/encoder.layer4.0.conv1", 20.0, &[(Nchw, 10.0), (Nhwc, 16.0)]),
                result("csc/linear-19c-2700", 10.0, &[(Nchw, 200.0)]),
                result("csc/linear-19c-10800", 40.0, &[(Nchw, 3200.0)]),
                result("csc/linear-19c-43200", 160.0, &[]),
            ],
        }
    }

    #[test]
    fn medians_means_and_slopes() {
        assert_eq!((median(&[3.0, 1.0, 2.0]), median(&[4.0, 1.0, 2.0, 3.0])), (2.0, 2.5));
        assert!(median(&[]).is_nan());
        assert!((geometric_mean([0.5, 2.0, 8.0].into_iter()) - 2.0).abs() < 1e-12);
        let squares: Vec<(f64, f64)> = [1.0, 10.0, 1000.0].map(|x| (x, 3.0 * x * x)).to_vec();
        assert!((log_slope(&squares).unwrap() - 2.0).abs() < 1e-12);
        assert_eq!(log_slope(&squares[..1]), None);
    }

    #[test]
    fn the_ratio_is_against_the_best_of_the_same_precision() {
        let run = invented();
        let first = &run.cases[0];
        assert_eq!(first.best_peer(Precision::F32).unwrap().0, Layout::Nhwc);
        assert_eq!((first.ratio(Precision::F32), first.ratio(Precision::Bf16)), (Some(0.8), Some(4.0)));
        assert_eq!(run.cases[4].ratio(Precision::F32), None);
        assert!((first.gflops().unwrap() - first.case.flop as f64 / 8.0 / 1e6).abs() < 1e-9);
        assert_eq!((first.ours.as_ref().unwrap().grown_mib(), run.cases[2].gflops()), (100.0, None));
    }

    #[test]
    fn summaries_count_each_layer_as_often_as_it_occurs() {
        let run = invented();
        let summaries = run.summaries();
        let dense = summaries.iter().find(|s| s.name == "conv-dense").unwrap();
        assert_eq!(dense.compared, 2);
        assert!((dense.geometric_mean - (0.8f64 * 2.0).sqrt()).abs() < 1e-12);
        assert_eq!(dense.worst, (2.0, "resnet34/encoder.layer4.0.conv1".into()));
        let times = run.cases[0].case.repeats as f64;
        assert!((dense.total_ratio - (times * 8.0 + 20.0) / (times * 10.0 + 10.0)).abs() < 1e-12);
        assert!(summaries.iter().any(|s| s.name == "all convolutions of resnet34" && s.compared == 2));
        assert_eq!(summaries.iter().find(|s| s.name == "csc").unwrap().compared, 2);
    }

    #[test]
    fn a_run_survives_json_and_merging_takes_the_later_case() {
        let run = invented();
        let text = serde_json::to_string(&run).unwrap();
        let read: Run = serde_json::from_str(&text).unwrap();
        assert_eq!(read, run);
        let mut later = read.clone();
        later.cases = vec![later.cases[2].clone()];
        later.cases[0].ours = Some(Measured { ms: vec![1.0], ..Default::default() });
        let mut merged = run.clone();
        merged.merge(later);
        assert_eq!((merged.cases.len(), merged.cases[2].ours_ms()), (run.cases.len(), Some(1.0)));
    }
}
