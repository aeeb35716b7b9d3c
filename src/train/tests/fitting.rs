//! The loop on the tiny model.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::adapter::Adapter;
use crate::config::Limits;
use crate::data::{Examples, Preference, Record};
use crate::device::Arbiter;
use crate::error::{Error, Result};
use crate::model::Model;
use crate::request::metric::*;
use crate::request::{
    BottleneckSpec, FullSpec, GradientCheckpointing, Hyperparameters, Ia3Spec, JobEvent, LinearLayers, LoraInit,
    LoraSpec, MemoryPlan, Objective, Optimizer, Placement, PrefixSpec, PromptSpec, Target, TrainingMemory, TunerSpec,
    VirtualInit,
};
use crate::store::DatasetKind;
use crate::text::Text;
use crate::train::fit::{CancelToken, DIVERGED_ABOVE, FitInputs, FitOutcome, fit};
use crate::train::objective::loss_tokens;
use crate::train::plan::plan;
use crate::train::tests::{lora, recipe};

const DPO: Objective = Objective::Dpo { beta: 0.1, label_smoothing: 0.0 };

struct Bench {
    model: Arc<Model>,
    text: Arc<Text>,
    arbiter: Arc<Arbiter>,
}

impl Bench {
    fn new() -> Self {
        let (model, text) = Model::tiny(1);
        Self { model, text, arbiter: Arbiter::new(0.5) }
    }

    fn chats(&self, n: usize) -> Examples {
        self.chats_of((0..n).map(|i| "yes, sir ".repeat(1 + i % 3)))
    }

    fn chats_of(&self, answers: impl Iterator<Item = String>) -> Examples {
        let chat = |(i, answer): (usize, String)| {
            let line = format!(r#"{{"prompt":"q{i}","completion":"{answer}"}}"#);
            match Record::parse(DatasetKind::Sft, line.as_bytes()).unwrap() {
                Record::Chat(chat) => chat.encode(&self.text).unwrap(),
                Record::Preference(_) => unreachable!(),
            }
        };
        Examples::Sft(answers.enumerate().map(chat).collect())
    }

    fn pairs(&self, n: usize) -> Examples {
        let pair = |i: usize| {
            let message = |role: &str, content: String| crate::request::ChatMessage::new(role, content);
            let preference = Preference {
                prompt: vec![message("user", format!("q{i}"))],
                chosen: vec![message("assistant", "good".into())],
                rejected: vec![message("assistant", "very bad".into())],
            };
            preference.encode(&self.text).unwrap()
        };
        Examples::Dpo((0..n).map(pair).collect())
    }

    fn start(&self, spec: LoraSpec) -> Adapter {
        Adapter::fresh(&spec, self.model.shape(), 5).unwrap()
    }

    fn fit(&self, run: &Run<'_>) -> Result<(FitOutcome, Vec<JobEvent>)> {
        let (outcome, events) = self.observed(run);
        outcome.map(|outcome| (outcome, events))
    }

    /// The events also of a run that fails.
    fn observed(&self, run: &Run<'_>) -> (Result<FitOutcome>, Vec<JobEvent>) {
        let (control, none) = (CancelToken::default(), run.validation_or_none());
        let plan = run.plan(&self.model, &none).unwrap();
        let file = (plan.paged_optimizer > 0).then(|| tempfile::tempfile().unwrap());
        file.iter().for_each(|file| file.set_len(plan.paged_optimizer).unwrap());
        let inputs = FitInputs {
            model: &self.model,
            start: run.start,
            reference: run.reference,
            train: run.train,
            validation: &none,
            objective: run.objective,
            recipe: &run.recipe,
            plan,
            optimizer_file: file.as_ref(),
            arbiter: &self.arbiter,
            control: &control,
        };
        let mut events = Vec::new();
        let outcome = fit(inputs, &mut |event| {
            if matches!(event, JobEvent::Step { step, .. } if Some(step) == run.stop_after) {
                control.stop();
            }
            events.push(event);
        });
        (outcome, events)
    }
}

struct Run<'a> {
    start: &'a Adapter,
    reference: Option<&'a Adapter>,
    train: &'a Examples,
    validation: Option<&'a Examples>,
    objective: Objective,
    recipe: Hyperparameters,
    stop_after: Option<u32>,
    max_bytes: u64,
}

impl<'a> Run<'a> {
    fn new(start: &'a Adapter, train: &'a Examples, recipe: Hyperparameters) -> Self {
        let objective = if matches!(train, Examples::Sft(_)) { Objective::Sft } else { DPO };
        let max_bytes = Limits::default().max_training_bytes;
        Self { start, reference: None, train, validation: None, objective, recipe, stop_after: None, max_bytes }
    }

    fn plan(&self, model: &Model, validation: &Examples) -> Result<MemoryPlan> {
        plan(model, self.start, (self.train, validation), self.objective, &self.recipe, self.max_bytes)
    }

    fn validation_or_none(&self) -> Examples {
        self.validation.cloned().unwrap_or_else(|| match self.train {
            Examples::Sft(_) => Examples::Sft(Vec::new()),
            Examples::Dpo(_) => Examples::Dpo(Vec::new()),
        })
    }
}

/// PiSSA and OLoRA are trained on the base without what they began as, and given as plain adapters on the base as it is. Nothing of the part
/// that was taken out has moved, not by weight decay either.
#[test]
fn what_began_as_a_part_of_the_base_ends_as_a_plain_adapter() {
    let (bench, recipe) = (Bench::new(), Hyperparameters { weight_decay: 0.1, epochs: 8, ..recipe() });
    let train = bench.chats(6);
    for init in [LoraInit::Pissa, LoraInit::Olora] {
        let mut start = bench.start(LoraSpec { init, dropout: 0.1, ..lora() });
        bench.model.start_as_part(&mut start, &bench.arbiter.train(), || Ok(())).unwrap();
        let run = Run { validation: Some(&train), ..Run::new(&start, &train, recipe.clone()) };
        let (outcome, events) = bench.fit(&run).unwrap();
        let evaluated = outcome.metrics["eval_loss"];
        assert!(evaluated < curve(&events)[0].0 - 0.1, "{init:?}: {evaluated}");
        for (site, pair) in outcome.adapter.pairs() {
            let began = start.pair(site).unwrap();
            assert_eq!((pair.rank, pair.alpha, pair.scale), (8, 16.0, began.scale));
            assert!(pair.a[began.a.len()..] == began.a, "{init:?} {site:?}");
            let rows = pair.b.chunks_exact(8).zip(began.b.chunks_exact(4));
            assert!(rows.clone().all(|(b, b0)| b[4..].iter().zip(b0).all(|(x, x0)| *x == -x0)), "{init:?} {site:?}");
            assert!(rows.clone().any(|(b, b0)| b[..4] != *b0), "{init:?} {site:?}: it has learnt");
        }
        // By itself the plain adapter has the loss that the run has measured.
        let still =
            Hyperparameters { max_steps: Some(1), learning_rate: 1e-12, warmup_steps: Some(0), ..recipe.clone() };
        let again = Run { validation: Some(&train), ..Run::new(&outcome.adapter, &train, still) };
        let loss = bench.fit(&again).unwrap().0.metrics["eval_loss"];
        assert!((loss - evaluated).abs() < 1e-3, "{init:?}: {loss} {evaluated}");
    }
}

/// (loss, gradient norm, margin) of each step.
fn curve(events: &[JobEvent]) -> Vec<(f64, f64, Option<f64>)> {
    let of_step = |event: &JobEvent| match event {
        JobEvent::Step { loss, grad_norm, metrics, .. } => Some((*loss, *grad_norm, metrics.get(MARGINS).copied())),
        _ => None,
    };
    events.iter().filter_map(of_step).collect()
}

/// The steps that an evaluation followed.
fn evaluated(events: &[JobEvent]) -> Vec<u32> {
    let of_event = |event: &JobEvent| match event {
        JobEvent::Evaluated { step, .. } => Some(*step),
        _ => None,
    };
    events.iter().filter_map(of_event).collect()
}

fn close(a: f64, b: f64) -> bool {
    (a - b).abs() <= 1e-4 * a.abs().max(b.abs())
}

#[test]
fn supervised_training_lowers_the_loss() {
    let bench = Bench::new();
    let (start, train) = (bench.start(lora()), bench.chats(4));
    let recipe = Hyperparameters { max_steps: Some(20), ..recipe() };
    let (outcome, events) = bench.fit(&Run::new(&start, &train, recipe)).unwrap();
    let curve = curve(&events);
    assert_eq!(curve.len(), 20);
    assert!(curve[19].0 < 0.8 * curve[0].0, "{curve:?}");
    assert!(outcome.adapter.pairs().any(|(_, pair)| pair.b.iter().any(|x| *x != 0.0)));
    assert_eq!(outcome.metrics["train_loss"], curve[19].0);
}

#[test]
fn accumulation_is_the_same_as_one_batch() {
    let bench = Bench::new();
    let (start, train) = (bench.start(lora()), bench.chats(8));
    let steps = |batch_size, gradient_accumulation_steps| {
        let recipe = Hyperparameters { batch_size, gradient_accumulation_steps, max_steps: Some(3), ..recipe() };
        curve(&bench.fit(&Run::new(&start, &train, recipe)).unwrap().1)
    };
    for (one, two) in steps(4, 1).iter().zip(steps(2, 2)) {
        assert!(close(one.0, two.0) && close(one.1, two.1), "{one:?} {two:?}");
    }
}

#[test]
fn the_same_inputs_give_the_same_bits() {
    let bench = Bench::new();
    let (start, train) = (bench.start(LoraSpec { dropout: 0.3, ..lora() }), bench.chats(6));
    let run = |seed| {
        let recipe = Hyperparameters { seed, sequential: false, epochs: 2, ..recipe() };
        bench.fit(&Run::new(&start, &train, recipe)).unwrap().0.adapter
    };
    let first = run(1);
    assert_eq!(first, run(1));
    assert_ne!(first, run(2));
}

#[test]
fn evaluation_changes_nothing_but_the_report() {
    let bench = Bench::new();
    let (start, train, validation) = (bench.start(lora()), bench.chats(4), bench.chats(3));
    let recipe = Hyperparameters { epochs: 5, eval_steps: Some(2), ..recipe() };
    let (without, _) = bench.fit(&Run::new(&start, &train, recipe.clone())).unwrap();
    let run = Run { validation: Some(&validation), ..Run::new(&start, &train, recipe) };
    let (with, events) = bench.fit(&run).unwrap();
    assert_eq!(with.adapter, without.adapter);
    assert_eq!(evaluated(&events), [2, 4, 5]);
    assert!(with.metrics["eval_loss"].is_finite());
}

/// 5 records in steps of 8: each step is an epoch, sees each record once and is followed by its evaluation.
#[test]
fn a_step_ends_with_the_epoch_and_the_evaluation_follows_it() {
    let bench = Bench::new();
    let (start, train, validation) = (bench.start(lora()), bench.chats(5), bench.chats(2));
    let recipe = |accumulate, eval_steps| Hyperparameters {
        epochs: 10,
        batch_size: 1,
        gradient_accumulation_steps: accumulate,
        eval_steps,
        sequential: false,
        ..recipe()
    };
    let run = |accumulate, eval_steps| {
        let run = Run { validation: Some(&validation), ..Run::new(&start, &train, recipe(accumulate, eval_steps)) };
        bench.fit(&run).unwrap().1
    };
    let events = run(8, None);
    assert_eq!(curve(&events).len(), 10);
    assert_eq!(evaluated(&events), (1..=10).collect::<Vec<_>>());
    assert_eq!(evaluated(&run(3, None)), (1..=10).map(|epoch| 2 * epoch).collect::<Vec<_>>());
    // The first step's loss is that of all five records, in any order.
    let whole = Run::new(&start, &train, Hyperparameters { batch_size: 5, ..recipe(1, None) });
    let whole = curve(&bench.fit(&whole).unwrap().1);
    assert!(close(curve(&events)[0].0, whole[0].0) && close(curve(&events)[0].1, whole[0].1));
}

#[test]
fn preferences_start_indifferent_and_learn_the_order() {
    let bench = Bench::new();
    let (start, train) = (bench.start(lora()), bench.pairs(4));
    let recipe = Hyperparameters { max_steps: Some(15), ..recipe() };
    let (trained, events) = bench.fit(&Run::new(&start, &train, recipe.clone())).unwrap();
    let first = curve(&events);
    assert!(close(first[0].0, 2_f64.ln()) && first[0].2.unwrap().abs() < 1e-4, "{first:?}");
    assert!(first[14].0 < first[0].0 && first[14].2 > Some(0.1), "{first:?}");

    let run = Run { reference: Some(&trained.adapter), ..Run::new(&trained.adapter, &train, recipe.clone()) };
    let continued = curve(&bench.fit(&run).unwrap().1);
    assert!(close(continued[0].0, 2_f64.ln()), "a continued adapter is its own reference: {continued:?}");
    let against_base = curve(&bench.fit(&Run::new(&trained.adapter, &train, recipe)).unwrap().1);
    assert!(against_base[0].2 > Some(0.1));
}

#[test]
fn a_stopped_run_takes_no_further_step() {
    let bench = Bench::new();
    let (start, train) = (bench.start(lora()), bench.chats(4));
    let recipe = Hyperparameters { max_steps: Some(10), ..recipe() };
    let run = Run { stop_after: Some(2), ..Run::new(&start, &train, recipe) };
    let (outcome, events) = bench.observed(&run);
    assert!(matches!(outcome, Err(Error::Cancelled)));
    assert_eq!(curve(&events).len(), 2, "{events:?}");
}

#[test]
fn a_run_that_diverges_says_so() {
    let bench = Bench::new();
    let mut start = bench.start(lora());
    for layer in start.pairs_mut().map(|(_, pair)| pair) {
        layer.b.fill(f32::INFINITY);
    }
    let outcome = bench.fit(&Run::new(&start, &bench.chats(4), recipe()));
    assert!(matches!(outcome, Err(Error::Precondition { reason: "TRAINING_DIVERGED", .. })));
}

/// Steps as long as the weights themselves: the adapter is there, and so is the reason why it must not serve.
#[test]
fn a_run_that_makes_everything_worse_has_diverged() {
    let bench = Bench::new();
    let (start, train) = (bench.start(lora()), bench.chats(4));
    let steps = |learning_rate, steps| Hyperparameters { learning_rate, max_steps: Some(steps), ..recipe() };
    let taught = bench.fit(&Run::new(&start, &train, steps(1e-2, 60))).unwrap().0;
    assert_eq!(taught.diverged, None);
    for few_or_many in [1, 3, 12] {
        let (outcome, _) = bench.fit(&Run::new(&taught.adapter, &train, steps(1.0, few_or_many))).unwrap();
        let why = outcome.diverged.unwrap_or_else(|| panic!("{few_or_many} steps: {:?}", outcome.metrics));
        assert!(why.contains("lower the learning rate"), "{why}");
        assert!(outcome.adapter.is_finite() && outcome.adapter != taught.adapter);
    }
}

/// Weights that give no numbers are of no use to anybody: those before them are kept.
#[test]
fn a_run_without_numbers_gives_the_last_weights_that_had_some() {
    let bench = Bench::new();
    let (start, train, validation) = (bench.start(lora()), bench.chats(4), bench.chats(2));
    let steps = |learning_rate, steps| Hyperparameters { learning_rate, max_steps: Some(steps), ..recipe() };
    let taught = bench.fit(&Run::new(&start, &train, steps(1e-2, 20))).unwrap().0.adapter;
    // Found by the second step, by the evaluation after the first, by the comparison after the last.
    for (steps, validation) in [(steps(1e38, 3), None), (steps(1e38, 1), Some(&validation)), (steps(1e38, 1), None)] {
        let run = Run { validation, ..Run::new(&taught, &train, steps) };
        let (outcome, events) = bench.fit(&run).unwrap();
        assert_eq!((curve(&events).len(), &outcome.adapter), (1, &taught));
        assert!(outcome.diverged.is_some_and(|why| why.contains("lower the learning rate")));
    }
}

/// The last step's records are harder than the first's, by more than makes a run diverged; but the training harms nothing.
#[test]
fn hard_records_at_the_end_are_no_divergence() {
    let bench = Bench::new();
    let (start, easy) = (bench.start(lora()), bench.chats(1));
    let steps = Hyperparameters { max_steps: Some(60), ..recipe() };
    let taught = bench.fit(&Run::new(&start, &easy, steps)).unwrap().0.adapter;
    let mixed = bench.chats_of(["yes, sir ".to_owned(), "0123456789 XYZ".to_owned()].into_iter());
    let recipe = Hyperparameters { learning_rate: 1e-6, batch_size: 1, ..recipe() };
    let (outcome, events) = bench.fit(&Run::new(&taught, &mixed, recipe)).unwrap();
    let curve = curve(&events);
    assert!(curve[1].0 > curve[0].0 + DIVERGED_ABOVE, "{curve:?}");
    assert_eq!(outcome.diverged, None);
}

/// Each step's measurements.
fn measured(events: &[JobEvent]) -> Vec<&BTreeMap<String, f64>> {
    let of_step = |event: &JobEvent| matches!(event, JobEvent::Step { .. });
    let steps = events.iter().filter(|event| of_step(event));
    steps.filter_map(|event| if let JobEvent::Step { metrics, .. } = event { Some(metrics) } else { None }).collect()
}

#[test]
fn supervised_training_tells_the_accuracy_of_its_tokens() {
    let bench = Bench::new();
    let (start, train, validation) = (bench.start(lora()), bench.chats(4), bench.chats(2));
    let Examples::Sft(examples) = &train else { panic!() };
    // The most likely ids by all logits of the base, which a fresh adapter is.
    let (mut right, mut all) = (0, 0);
    for example in examples {
        let wanted: Vec<_> = (1..example.ids.len()).filter(|i| example.in_loss[*i]).map(|i| (0, i - 1)).collect();
        assert_eq!(wanted.len(), loss_tokens(example));
        let logits = bench.model.logits(&[&example.ids], &wanted, Default::default()).unwrap();
        let best = logits.chunks_exact(bench.model.vocab_size()).map(crate::kernels::cpu::argmax);
        right += best.zip(&wanted).filter(|(best, (_, i))| *best == Some(example.ids[i + 1] as usize)).count();
        all += wanted.len();
    }
    let recipe = Hyperparameters { max_steps: Some(40), ..recipe() };
    let run = Run { validation: Some(&validation), ..Run::new(&start, &train, recipe) };
    let (outcome, events) = bench.fit(&run).unwrap();
    let measured = measured(&events);
    assert!(
        close(measured[0][TOKEN_ACCURACY], right as f64 / all as f64)
            || right == 0 && measured[0][TOKEN_ACCURACY] == 0.0
    );
    assert!(measured[39][TOKEN_ACCURACY] > measured[0][TOKEN_ACCURACY] + 0.3, "{measured:?}");
    assert_eq!(outcome.metrics["train_mean_token_accuracy"], measured[39][TOKEN_ACCURACY]);
    assert!(outcome.metrics["eval_mean_token_accuracy"] > 0.3);
}

#[test]
fn preferences_tell_rewards_and_log_probabilities() {
    let bench = Bench::new();
    let (start, train) = (bench.start(lora()), bench.pairs(3));
    let Examples::Dpo(pairs) = &train else { panic!() };
    let logp = |pick: fn(&crate::data::Pair) -> &crate::text::Conversation| {
        let of_pair = |pair| {
            let answer = pick(pair);
            let wanted: Vec<_> = (1..answer.ids.len()).filter(|i| answer.in_loss[*i]).map(|i| (0, i - 1)).collect();
            let logprobs = bench.model.token_logprobs(&[&answer.ids], &wanted, Default::default()).unwrap();
            logprobs.iter().map(|x| f64::from(*x)).sum::<f64>()
        };
        pairs.iter().map(of_pair).sum::<f64>() / pairs.len() as f64
    };
    let (chosen, rejected) = (logp(|pair| &pair.chosen), logp(|pair| &pair.rejected));
    let recipe = Hyperparameters { max_steps: Some(12), ..recipe() };
    let (outcome, events) = bench.fit(&Run::new(&start, &train, recipe)).unwrap();
    let measured = measured(&events);
    assert!(close(measured[0][CHOSEN_LOGPS], chosen) && close(measured[0][REJECTED_LOGPS], rejected), "{measured:?}");
    assert!(measured[0][CHOSEN_REWARDS].abs() < 1e-4 && measured[0][REJECTED_REWARDS].abs() < 1e-4);
    for metrics in &measured {
        let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-4, "{metrics:?}");
        near(metrics[MARGINS], metrics[CHOSEN_REWARDS] - metrics[REJECTED_REWARDS]);
        near(metrics[CHOSEN_REWARDS], 0.1 * (metrics[CHOSEN_LOGPS] - chosen));
        near(metrics[REJECTED_REWARDS], 0.1 * (metrics[REJECTED_LOGPS] - rejected));
    }
    assert!(measured[11][CHOSEN_REWARDS] > measured[11][REJECTED_REWARDS] && measured[11][ACCURACIES] == 1.0);
    assert_eq!(outcome.metrics["train_margin"], outcome.metrics["train_rewards/margins"]);
}

/// A reference pass costs as much as a third of a step: only what steps and evaluations use is scored.
#[test]
fn few_steps_have_few_pairs_scored_by_the_reference() {
    let bench = Bench::new();
    let (start, train, validation) = (bench.start(lora()), bench.pairs(20), bench.pairs(3));
    let scored = |max_steps| {
        let recipe = Hyperparameters { max_steps: Some(max_steps), sequential: false, ..recipe() };
        let run = Run { validation: Some(&validation), ..Run::new(&start, &train, recipe) };
        match bench.fit(&run).unwrap().1.into_iter().next() {
            Some(JobEvent::Message(text)) => text,
            other => panic!("{other:?}"),
        }
    };
    assert!(scored(2).contains(" 11 pairs"), "{}", scored(2));
    assert!(scored(7).contains(" 23 pairs"), "{}", scored(7));
}

/// Fresh adapters of every kind.
fn starts(bench: &Bench) -> Vec<Adapter> {
    use crate::request::Target::{DownProj, OProj, QProj};
    let tuners: [TunerSpec; 10] = [
        lora().into(),
        LoraSpec { lora_bias: true, targets: vec![QProj, DownProj], ..lora() }.into(),
        LoraSpec { trainable_token_indices: vec![40, 7], ..lora() }.into(),
        LoraSpec { dropout: 0.1, ..lora() }.into(),
        LoraSpec { use_dora: true, targets: vec![QProj, DownProj], ..lora() }.into(),
        Ia3Spec::default().into(),
        Ia3Spec { targets: vec![QProj, OProj], feedforward: vec![OProj] }.into(),
        PromptSpec { virtual_tokens: 5, init: VirtualInit::Random }.into(),
        PrefixSpec { virtual_tokens: 5, ..PrefixSpec::default() }.into(),
        BottleneckSpec { size: 8, placement: Placement::Both, ..BottleneckSpec::default() }.into(),
    ];
    let start = |tuner: &TunerSpec| {
        let mut adapter = Adapter::fresh(tuner, bench.model.shape(), 5).unwrap();
        bench.model.begin(&mut adapter, &[7, 30, 211, 40, 11], None).unwrap();
        adapter
    };
    let linear = LinearLayers { targets: vec![QProj, DownProj], layers: None };
    let full = [None, Some(linear)].map(|linear| FullSpec { linear, ..FullSpec::default() });
    let copies = full.iter().map(|spec| bench.model.copies(spec, &bench.arbiter.train()).unwrap());
    tuners.iter().map(start).chain(copies).collect()
}

fn peak(events: &[JobEvent]) -> TrainingMemory {
    let of_event = |event: &JobEvent| match event {
        JobEvent::MemoryPeak(memory) => Some(*memory),
        _ => None,
    };
    events.iter().find_map(of_event).unwrap()
}

/// Of each kind of adapter, with and without checkpointing, on batches of several shapes.
#[test]
fn a_run_holds_what_was_planned() {
    use GradientCheckpointing::{Auto, Off, On};
    let bench = Bench::new();
    let mixed = bench.chats_of([1, 12, 3, 1, 6].iter().map(|times| "yes, sir ".repeat(*times)));
    let batches = [(bench.chats(6), 4), (mixed, 2), (bench.pairs(4), 2)];
    for (start, (train, batch_size)) in
        starts(&bench).iter().flat_map(|start| batches.iter().map(move |of| (start, of)))
    {
        for gradient_checkpointing in [Auto, On, Off] {
            let recipe =
                Hyperparameters { batch_size: *batch_size, gradient_checkpointing, max_steps: Some(4), ..recipe() };
            let validation = matches!(train, Examples::Sft(_)).then(|| bench.chats(2));
            let run = Run { validation: validation.as_ref(), ..Run::new(start, train, recipe) };
            let planned = run.plan(&bench.model, &run.validation_or_none()).unwrap();
            let held = peak(&bench.fit(&run).unwrap().1);
            for (planned, held) in
                [(planned.memory.total(), held.total()), (planned.memory.activations, held.activations)]
            {
                let part = held as f64 / planned as f64;
                assert!((part - 1.0).abs() <= 0.15, "{:?} {:?}: {part} of {planned}", start.spec, run.recipe);
            }
            assert_eq!(planned.gradient_checkpointing, gradient_checkpointing == On);
        }
    }
}

#[test]
fn checkpointing_changes_no_bit_and_is_chosen_where_memory_is_short() {
    use GradientCheckpointing::{Auto, Off, On};
    let bench = Bench::new();
    let train = bench.chats(6);
    for start in starts(&bench) {
        let run = |gradient_checkpointing, max_bytes| {
            let recipe = Hyperparameters { gradient_checkpointing, epochs: 2, ..recipe() };
            let run = Run { max_bytes, ..Run::new(&start, &train, recipe) };
            let planned = run.plan(&bench.model, &run.validation_or_none());
            planned.map(|planned| (planned, bench.fit(&run).unwrap()))
        };
        let (kept, (trained, events)) = run(Off, u64::MAX).unwrap();
        let (least, (again, same)) = run(On, u64::MAX).unwrap();
        assert_eq!((&again.adapter, curve(&same)), (&trained.adapter, curve(&events)));
        assert!(least.memory.total() < kept.memory.total(), "{least:?} {kept:?}");
        assert_eq!(run(Auto, kept.memory.total()).unwrap().0, kept);
        let (chosen, (again, _)) = run(Auto, kept.memory.total() - 1).unwrap();
        assert!(chosen.gradient_checkpointing && chosen.memory.total() < kept.memory.total(), "{chosen:?}");
        assert_eq!(again.adapter, trained.adapter);
        let refused = run(Off, kept.memory.total() / 4).unwrap_err().to_string();
        assert!(refused.contains("max_training_bytes") && refused.contains("gradient_checkpointing"), "{refused}");
    }
}

/// The largest tensor's moments are the least that memory must have room for.
#[test]
fn a_state_in_a_file_changes_no_bit_and_is_chosen_where_memory_is_short() {
    use GradientCheckpointing::{Auto, On};
    let bench = Bench::new();
    let train = bench.chats(6);
    for (start, optimizer) in starts(&bench)
        .iter()
        .flat_map(|start| [Optimizer::AdamW, Optimizer::AdamW8Bit].map(|optimizer| (start, optimizer)))
    {
        if start.tensors().count() == 1 {
            continue;
        }
        let run = |gradient_checkpointing, max_bytes| {
            let recipe = Hyperparameters { optimizer, gradient_checkpointing, epochs: 2, ..recipe() };
            let run = Run { max_bytes, ..Run::new(start, &train, recipe) };
            let planned = run.plan(&bench.model, &run.validation_or_none());
            planned.map(|planned| (planned, bench.fit(&run).unwrap()))
        };
        let (kept, (trained, events)) = run(On, u64::MAX).unwrap();
        let (paged, (again, same)) = run(On, kept.memory.total() - 1).unwrap();
        assert_eq!([kept.paged_optimizer, paged.paged_optimizer], [0, kept.memory.optimizer], "{:?}", start.spec);
        assert!(paged.memory.total() < kept.memory.total() && paged.memory.optimizer < kept.memory.optimizer);
        assert_eq!((&again.adapter, curve(&same)), (&trained.adapter, curve(&events)));
        assert_eq!(peak(&same).optimizer, paged.memory.optimizer);
        let (checkpointed, _) = run(Auto, kept.memory.total()).unwrap();
        assert!(checkpointed.paged_optimizer == 0, "layers are computed again before a file is made");
        let refused = run(Auto, 1000).unwrap_err().to_string();
        assert!(refused.contains("max_training_bytes"), "{refused}");
    }
}

/// All of it, and a few layers: nothing else of the base's tensors has a copy, and what has one moves.
#[test]
fn copies_of_the_base_learn_and_the_base_stays() {
    let bench = Bench::new();
    let train = bench.chats(8);
    let linear = LinearLayers { targets: vec![Target::UpProj], layers: Some(vec![0]) };
    for (spec, tensors) in [(FullSpec::default(), 20), (FullSpec { linear: Some(linear), ..FullSpec::default() }, 1)] {
        let start = bench.model.copies(&spec, &bench.arbiter.train()).unwrap();
        assert_eq!(start.tensors().count(), tensors);
        let recipe = Hyperparameters { max_steps: Some(12), learning_rate: 1e-3, ..recipe() };
        let (outcome, events) = bench.fit(&Run::new(&start, &train, recipe)).unwrap();
        let losses: Vec<f64> = curve(&events).iter().map(|(loss, ..)| *loss).collect();
        assert!(losses[11] < losses[0] - 0.05, "{spec:?}: {losses:?}");
        let moved = outcome.adapter.tensors().zip(start.tensors()).all(|(now, before)| now != before);
        assert!(moved && outcome.adapter.sites.is_empty());
        assert_eq!(bench.model.copies(&spec, &bench.arbiter.train()).unwrap(), start, "the base is as it was");
    }
}
