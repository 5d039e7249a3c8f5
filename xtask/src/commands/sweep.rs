//! `sweep`: one objective over a grid of its settings, beside the baseline, with the teacher trained once.

use std::path::PathBuf;

use anyhow::Result;
use serde_json::json;

use segdistill_eval::stats::MeanSd;
use segdistill_eval::table::{ResultRow, write_atomic};

use crate::cli::Sweep;
use crate::commands::reproduce::{all_finished, dry_run, run_plan};
use crate::exit::usage;
use crate::recipe::{Plan, Variant, Variation};

/// Most points of a grid, each a student a seed.
const MANY: usize = 200;

/// Runs the command.
pub(crate) fn run(args: &Sweep) -> Result<()> {
    let variations = args.vary.iter().map(|text| text.parse()).collect::<Result<Vec<Variation>>>()?;
    if variations.is_empty() {
        return Err(usage!("nothing to vary\n  hint: such as --vary csc.weight=1,10,100"));
    }
    let names: Vec<String> = variations.iter().map(Variation::name).collect();
    if let Some(twice) = names.iter().enumerate().find(|(i, name)| names[..*i].contains(name)) {
        return Err(usage!("{} is varied twice\n  hint: give all its values in one --vary", twice.1));
    }
    let points = variations.iter().map(|v| v.values.len()).fold(1usize, usize::saturating_mul);
    if points > MANY {
        return Err(usage!("the grid has {points} points\n  hint: at most {MANY}; vary fewer settings at once"));
    }
    let (plan, variants) = Plan::resolve_sweep(&args.recipe, &args.method, &variations)?;
    let out = args.recipe.out.clone().unwrap_or_else(|| PathBuf::from(format!("runs/{}-sweep", plan.recipe)));
    if args.dry_run {
        let device = super::device(&plan.device, plan.tf32)?;
        return dry_run(&plan, &device, args.json);
    }
    let (folder, written) = run_plan(&plan, &out, args.resume)?;
    let table = Table::of(&names, &variants, &written.rows);
    let report = folder.join("report");
    write_atomic(&report.join("sweep.csv"), table.csv().as_bytes())?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&table.json())?);
    } else {
        println!("{}", table.text());
    }
    eprintln!("sweep: {}", report.join("sweep.csv").display());
    eprintln!("report: {}", written.page.display());
    all_finished(&written.failed)
}

/// What a point of the grid reached.
struct Point {
    values: Vec<String>,
    val: MeanSd,
    gain: f64,
}

/// The grid with what each point reached on val, and the baseline.
struct Table<'a> {
    names: &'a [String],
    baseline: MeanSd,
    points: Vec<Point>,
}

impl<'a> Table<'a> {
    fn of(names: &'a [String], variants: &[Variant], rows: &[ResultRow]) -> Self {
        let val = |method: &str| {
            let of = |r: &&ResultRow| r.role == "student" && r.split == "val" && r.method == method;
            MeanSd::of(rows.iter().filter(of).map(|r| r.miou))
        };
        let baseline = val("ce");
        let point = |v: &Variant| {
            let val = val(&v.method);
            Point { values: v.values.clone(), val, gain: val.mean - baseline.mean }
        };
        Self { names, baseline, points: variants.iter().map(point).collect() }
    }

    fn csv(&self) -> String {
        let mut out = format!("{},n_seeds,val_miou,val_miou_sd,gain_over_ce\n", self.names.join(","));
        for p in &self.points {
            // A point none of whose students finished has no score.
            let cell = |value: f64| if value.is_finite() { value.to_string() } else { String::new() };
            let (mean, sd, gain) = (cell(p.val.mean), cell(p.val.sd.unwrap_or(f64::NAN)), cell(p.gain));
            out.push_str(&format!("{},{},{mean},{sd},{gain}\n", p.values.join(","), p.val.n));
        }
        out
    }

    fn json(&self) -> serde_json::Value {
        let point = |p: &Point| {
            let values: serde_json::Map<String, serde_json::Value> =
                self.names.iter().zip(&p.values).map(|(name, value)| (name.clone(), json!(value))).collect();
            json!({
                "settings": values, "n_seeds": p.val.n, "val_miou": p.val.mean, "val_miou_sd": p.val.sd,
                "gain_over_ce": p.gain,
            })
        };
        json!({
            "baseline": { "method": "ce", "val_miou": self.baseline.mean, "val_miou_sd": self.baseline.sd },
            "points": self.points.iter().map(point).collect::<Vec<_>>(),
        })
    }

    fn text(&self) -> String {
        let score = |m: &MeanSd| {
            if m.n == 0 {
                return "diverged".to_string();
            }
            let sd = m.sd.map_or(String::new(), |sd| format!(" ± {:.2}", 100.0 * sd));
            let of =
                if m.n < self.baseline.n { format!(", {} of {} seeds", m.n, self.baseline.n) } else { String::new() };
            format!("{:.2}{sd}{of}", 100.0 * m.mean)
        };
        let width = |i: usize| {
            let values = self.points.iter().map(|p| p.values[i].len());
            values.chain([self.names[i].len()]).max().unwrap_or(0)
        };
        let cells = |cells: &[String]| -> String {
            cells.iter().enumerate().map(|(i, cell)| format!("{cell:>w$}  ", w = width(i))).collect()
        };
        let mut lines = vec![
            format!("val mIoU in percent; ce alone: {} ({} seeds)", score(&self.baseline), self.baseline.n),
            format!("{}{:>14}  {:>6}", cells(self.names), "val mIoU", "gain"),
        ];
        for p in &self.points {
            let gain = if p.gain.is_finite() { format!("{:+.2}", 100.0 * p.gain) } else { "-".to_string() };
            lines.push(format!("{}{:>14}  {gain:>6}", cells(&p.values), score(&p.val)));
        }
        lines.push("the best of several settings on val is chosen on val: confirm it on test, once".to_string());
        lines.join("\n")
    }
}
