//! What the loop counts, by a recorder of this thread.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use metrics::{Counter, Gauge, Histogram, Key, KeyName, Metadata, Recorder, SharedString, Unit};

use super::*;

/// Keeps the counters, by name.
#[derive(Default)]
struct Counters(Mutex<HashMap<String, Arc<AtomicU64>>>);

impl Counters {
    fn get(&self, name: &str) -> u64 {
        self.0.lock().unwrap().get(name).map_or(0, |counter| counter.load(Ordering::Relaxed))
    }
}

impl Recorder for Counters {
    fn describe_counter(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_gauge(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_histogram(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

    fn register_counter(&self, key: &Key, _: &Metadata<'_>) -> Counter {
        Counter::from_arc(self.0.lock().unwrap().entry(key.name().to_owned()).or_default().clone())
    }

    fn register_gauge(&self, _: &Key, _: &Metadata<'_>) -> Gauge {
        Gauge::noop()
    }

    fn register_histogram(&self, _: &Key, _: &Metadata<'_>) -> Histogram {
        Histogram::noop()
    }
}

#[test]
fn a_prompt_is_counted_when_all_of_it_is_computed() {
    let counters = Counters::default();
    metrics::with_local_recorder(&counters, || {
        let w = world();
        let layout = KvLayout { block_tokens: 8, blocks: 40, dtype: KvDtype::F16 };
        let executor = w.model.executor(layout).unwrap();
        // A prompt of 20 tokens takes three steps of 8 rows.
        let (mut state, bare) = bare_loop_beside(w.hub.clone(), &tight(8, 40), layout, executor);
        let _reader = submit(&bare, SequenceAdapter::Base, 4);
        let counted = [(); 4].map(|()| {
            assert!(state.turn());
            counters.get("tenora_prompt_tokens_total")
        });
        assert_eq!(counted, [0, 0, 20, 20]);
    });
}
