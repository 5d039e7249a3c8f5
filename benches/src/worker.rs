//! Our side of a comparison: a process that reads requests and answers them, see [`crate::protocol`].

use std::io::{BufRead, Write};
use std::time::Instant;

use crate::case::Precision;
use crate::error::{BenchError, Result};
use crate::memory::{memory, reset_peak};
use crate::peak::peak;
use crate::protocol::{HELLO, Hello, Prepared, Reply, Request, Round};
use crate::results::median;
use crate::workload::{Workload, prepare};

/// A run below this is preceded by one that is not measured: caches and clocks are cold after a pause.
const WARM_BELOW_MS: f64 = 100.0;
const MOST_RUNS: usize = 400;

/// Answers requests until the input ends.
///
/// # Errors
/// `Io` when the pipes fail. What a case cannot do is answered, not returned.
pub fn serve(input: impl BufRead, mut output: impl Write) -> Result<()> {
    let mut say = |reply: &Reply| -> Result<()> {
        writeln!(output, "{}", serde_json::to_string(reply).map_err(std::io::Error::from)?)?;
        Ok(output.flush()?)
    };
    let threads = rayon::current_num_threads();
    let idle_kib = memory().map_or(0, |m| m.resident_kib);
    let kernels = segdistill_ops::Precision::F32.on_cpu().unwrap_or("no");
    let about = format!("segdistill {}, {kernels} kernels", env!("CARGO_PKG_VERSION"));
    say(&Reply::Hello(Hello { hello: HELLO.into(), about, threads, idle_kib }))?;
    let mut ready: Option<Ready> = None;
    for line in input.lines() {
        let line = line?;
        if line.trim().is_empty() {
            continue;
        }
        let reply = serde_json::from_str::<Request>(&line)
            .map_err(|e| BenchError::usage(format!("not a request: {e}"), "see `protocol`"))
            .and_then(|request| respond(request, &mut ready));
        say(&reply.unwrap_or_else(|e| refusal(&e)))?;
    }
    Ok(())
}

/// What is prepared, and how long a run took last.
struct Ready {
    workload: Box<dyn Workload>,
    last_ms: f64,
}

fn respond(request: Request, ready: &mut Option<Ready>) -> Result<Reply> {
    match request {
        Request::Prepare { case, variant, answer, .. } => {
            // Dropped first: the two need not fit together.
            *ready = None;
            let precision = match variant.as_str() {
                "f32" => Precision::F32,
                "bf16" => Precision::Bf16,
                other => return Err(BenchError::usage(format!("unknown precision `{other}`"), "f32 or bf16")),
            };
            let mut workload = prepare(&case, precision)?;
            let answer = if answer { workload.answer()? } else { Default::default() };
            *ready = Some(Ready { workload, last_ms: 0.0 });
            reset_peak();
            Ok(Reply::Prepared(Prepared { answer }))
        }
        Request::Round { least_ms } => match ready {
            Some(ready) => Ok(Reply::Round(round(ready, least_ms)?)),
            None => Err(BenchError::usage("nothing is prepared", "send `prepare` first")),
        },
        Request::Peak => Ok(Reply::Peak(peak())),
    }
}

fn round(ready: &mut Ready, least_ms: f64) -> Result<Round> {
    let mut run = || -> Result<f64> {
        let begun = Instant::now();
        ready.workload.run()?;
        Ok(begun.elapsed().as_secs_f64() * 1e3)
    };
    if ready.last_ms < WARM_BELOW_MS {
        run()?;
    }
    let (mut taken, mut total) = (Vec::new(), 0.0);
    while taken.is_empty() || (total < least_ms && taken.len() < MOST_RUNS) {
        let ms = run()?;
        total += ms;
        taken.push(ms);
    }
    ready.last_ms = median(&taken);
    Ok(Round { ms: ready.last_ms, runs: taken.len(), peak_kib: memory().map_or(0, |m| m.peak_kib) })
}

fn refusal(error: &BenchError) -> Reply {
    match error {
        BenchError::Usage { what, hint } => Reply::Error { error: what.clone(), hint: Some(hint.clone()), usage: true },
        other => {
            let text = other.to_string();
            let (error, hint) = match text.split_once("\n  hint: ") {
                Some((error, hint)) => (error.to_string(), Some(hint.to_string())),
                None => (text, None),
            };
            Reply::Error { error, hint, usage: false }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalogue::cases;

    fn talk(requests: &[String]) -> Vec<Reply> {
        let mut output = Vec::new();
        serve(requests.join("\n").as_bytes(), &mut output).unwrap();
        String::from_utf8(output).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    #[test]
    fn a_case_is_prepared_answered_and_timed() {
        let all = cases().unwrap();
        let case = Box::new(all.into_iter().find(|c| c.name == "csc/linear-11c-690").unwrap());
        let name = case.name.clone();
        let prepare = Request::Prepare { name, case, variant: "f32".into(), answer: true };
        let round = serde_json::to_string(&Request::Round { least_ms: 0.0 }).unwrap();
        let replies = talk(&[serde_json::to_string(&prepare).unwrap(), round.clone(), round]);
        let [Reply::Hello(hello), Reply::Prepared(prepared), Reply::Round(first), Reply::Round(_)] = replies.as_slice()
        else {
            panic!("{replies:?}")
        };
        assert_eq!((hello.hello.as_str(), hello.threads), (HELLO, rayon::current_num_threads()));
        assert!(prepared.answer["value"] > 0.0 && prepared.answer["grad"] > 0.0);
        assert!(first.ms > 0.0 && first.runs == 1);
    }

    #[test]
    fn what_cannot_be_done_is_answered() {
        let replies =
            talk(&["{\"do\":\"round\",\"least_ms\":1}".into(), "nonsense".into(), "{\"do\":\"dance\"}".into()]);
        assert_eq!(replies.len(), 4);
        for (reply, word) in replies[1..].iter().zip(["nothing is prepared", "not a request", "not a request"]) {
            assert!(matches!(reply, Reply::Error { error, usage: true, .. } if error.contains(word)), "{reply:?}");
        }
    }
}
