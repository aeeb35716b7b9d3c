//! The scheduler by itself: who gets which rows.

use super::*;
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::ops::Range;

use crate::engine::prefix::{CacheNamespace, PageKey};
use crate::ids::{Digest, TenantId};
use crate::model::batch::NO_PAGE;
use crate::model::groups::{first_read, most_read_before};

fn config(blocks: usize) -> SchedulerConfig {
    SchedulerConfig {
        paging: Paging::new(4, 24, [None].into()),
        blocks,
        max_idle_blocks: blocks,
        max_running: 4,
        max_step_rows: 24,
        max_prefill_rows: 24,
    }
}

fn scheduler(blocks: usize) -> Scheduler {
    Scheduler::new(config(blocks))
}

fn request(tenant: u32, length: usize) -> SequenceRequest {
    SequenceRequest { tenant, weight: 1, priority: 0, length, longest: length, hashes: None }
}

/// A sequence of these tokens, whose blocks are shared with others that begin as it does.
fn sharing(ids: &[u32]) -> SequenceRequest {
    let (tenant, digest) = (TenantId::new("t").unwrap(), Digest::of(b""));
    let namespace = CacheNamespace { tenant: &tenant, base: digest, template: digest, version: None };
    SequenceRequest { hashes: Some(PrefixHashes::new(&namespace, 4, ids, ids.len())), ..request(0, ids.len()) }
}

fn plan(s: &mut Scheduler) -> Vec<ScheduledChunk> {
    let mut planned = Vec::new();
    s.plan(&mut planned, &mut |_| Readiness::Ready);
    planned
}

fn planned_ids(s: &mut Scheduler) -> Vec<u64> {
    plan(s).iter().map(|p| p.id).collect()
}

#[test]
fn a_long_prompt_is_cut_and_does_not_stop_decoding() {
    let mut s = scheduler(100);
    s.add(1, request(0, 4));
    assert_eq!(plan(&mut s)[0].count, 4);
    s.extend(1);
    s.add(2, request(0, 100));
    let planned = plan(&mut s);
    assert_eq!((planned[0].id, planned[0].count, planned[0].completes), (1, 1, true));
    assert_eq!((planned[1].id, planned[1].count, planned[1].completes), (2, 23, false));
}

#[test]
fn prompts_keep_to_their_budget_while_others_decode() {
    let mut s = Scheduler::new(SchedulerConfig { max_prefill_rows: 8, ..config(100) });
    s.add(1, request(0, 4));
    s.add(2, request(0, 100));
    let rows = |planned: Vec<ScheduledChunk>| planned.iter().map(|p| (p.id, p.count)).collect::<Vec<_>>();
    assert_eq!(rows(plan(&mut s)), [(1, 4), (2, 20)], "the whole step, where nobody decodes");
    s.extend(1);
    assert_eq!(rows(plan(&mut s)), [(1, 1), (2, 8)]);
    assert_eq!(rows(plan(&mut s)), [(2, 24)]);
}

#[test]
fn priorities_order_a_tenants_own_and_no_others() {
    let mut s = Scheduler::new(SchedulerConfig { max_running: 1, ..config(100) });
    let urgent = |tenant, priority| SequenceRequest { priority, ..request(tenant, 4) };
    for (id, tenant, priority) in [(1, 0, 0), (2, 0, -5), (3, 0, 7), (4, 0, 7), (5, 1, 100), (6, 1, 100), (7, 2, -100)]
    {
        s.add(id, urgent(tenant, priority));
    }
    let mut order = Vec::new();
    while let [planned] = &plan(&mut s)[..] {
        order.push(planned.id);
        s.remove(planned.id);
    }
    assert_eq!(order, [3, 5, 7, 4, 6, 1, 2], "tenants take turns, each by its own priorities");
}

#[test]
fn what_others_have_computed_is_found_once_it_has_proved_sound() {
    let mut s = scheduler(100);
    let first: Vec<u32> = (0..20).collect();
    let second: Vec<u32> = (0..12).chain([99; 8]).collect();
    s.add(1, sharing(&first));
    assert_eq!((plan(&mut s)[0].start, s.blocks().idle()), (0, 0));
    s.add(2, sharing(&second));
    assert_eq!(plan(&mut s)[0].start, 0, "what is not published is not found");
    s.remove(2);
    s.publish(1, &first);
    s.add(3, sharing(&second));
    let planned = plan(&mut s)[0];
    assert_eq!((planned.id, planned.start, planned.count), (3, 12, 8), "three blocks are the same");
    assert_eq!(s.blocks().used(), 5 + 2);
    s.remove(1);
    s.remove(3);
    assert_eq!((s.blocks().used(), s.blocks().idle()), (0, 5), "what was published stays, what was not does not");
    s.add(4, sharing(&first));
    let planned = plan(&mut s)[0];
    assert_eq!((planned.start, planned.count), (16, 4), "the last token is computed, whatever is found");
    s.add(5, SequenceRequest { tenant: 1, ..request(1, 4) });
    assert_eq!((s.served(0), s.served(1)), (4 * TOKEN, 4 * TOKEN), "what is found is not counted");
}

#[test]
fn one_that_starts_over_finds_its_own() {
    let mut s = Scheduler::new(SchedulerConfig { blocks: 8, ..config(8) });
    let (first, second): (Vec<u32>, Vec<u32>) = ((0..12).collect(), (100..112).collect());
    s.add(1, sharing(&first));
    s.add(2, sharing(&second));
    assert_eq!(plan(&mut s).len(), 2);
    let mut ids = [first, second];
    let mut restart = None;
    for _ in 0..12 {
        for id in [1, 2] {
            s.publish(id, &ids[id as usize - 1]);
            s.extend(id);
            ids[id as usize - 1].push(7);
        }
        let planned = plan(&mut s);
        if planned.len() == 1 {
            s.remove(1);
            restart = plan(&mut s).first().copied();
            break;
        }
    }
    let restart = restart.expect("the pool is too small for both");
    assert_eq!(restart.id, 2);
    assert!(restart.start >= 8, "{restart:?}");
}

#[test]
fn two_that_computed_the_same_share_it_from_then_on() {
    let mut s = scheduler(100);
    let ids: Vec<u32> = (0..12).collect();
    s.add(1, sharing(&ids));
    s.add(2, sharing(&ids));
    assert_eq!(plan(&mut s).len(), 2);
    assert_eq!(s.blocks().used(), 6);
    s.publish(1, &ids);
    s.publish(2, &ids);
    assert_eq!(s.blocks().used(), 3);
}

#[test]
fn the_least_served_tenant_comes_first() {
    let mut s = Scheduler::new(SchedulerConfig { max_running: 1, max_step_rows: 64, ..config(100) });
    s.add(1, request(0, 40));
    plan(&mut s);
    s.add(2, request(0, 4));
    s.add(3, request(0, 4));
    s.add(4, request(1, 4));
    s.remove(1);
    let mut order = Vec::new();
    while let [planned] = &plan(&mut s)[..] {
        order.push(planned.id);
        s.remove(planned.id);
    }
    assert_eq!(order, [2, 4, 3], "tenant 1 was lifted to tenant 0's 40 tokens, no more and no less");
}

#[test]
fn a_prompt_that_does_not_fit_beside_the_others_waits_instead_of_starting_over() {
    let mut s = scheduler(30);
    s.add(1, request(0, 40));
    plan(&mut s);
    plan(&mut s);
    s.add(2, request(0, 100));
    for _ in 0..20 {
        s.extend(1);
        assert_eq!(planned_ids(&mut s), [1]);
    }
    s.remove(1);
    assert_eq!(plan(&mut s)[0].id, 2);
}

#[test]
fn a_tenant_with_nothing_running_takes_a_place_from_the_busiest() {
    let mut s = scheduler(100);
    (1..=6).for_each(|id| s.add(id, request(0, 4)));
    plan(&mut s);
    (1..=4).for_each(|id| s.extend(id));
    s.add(7, request(1, 4));
    // Now both have had as much, and the other tenant's next was there before.
    plan(&mut s);
    (1..=4).for_each(|id| s.extend(id));
    assert_eq!(planned_ids(&mut s), [1, 2, 3, 7], "with all places taken");
    s.add(8, request(1, 4));
    [1, 2, 3, 7].iter().for_each(|id| s.extend(*id));
    assert_eq!(planned_ids(&mut s), [1, 2, 3, 7], "and only one");
}

#[test]
fn nobody_starts_over_for_one_that_does_not_fit_all_the_same() {
    let mut s = scheduler(30);
    (1..=3).for_each(|id| s.add(id, request(0, 4)));
    s.add(4, request(1, 80));
    while plan(&mut s).iter().any(|p| !p.completes) {}
    assert_eq!(s.blocks().available(), 30 - 3 - 20);
    // Two of tenant 0's would give their two blocks, which with the free ones are too few.
    s.add(5, request(2, 60));
    (1..=4).for_each(|id| s.extend(id));
    assert_eq!(planned_ids(&mut s), [1, 2, 3, 4]);
}

#[test]
fn a_short_prompt_does_not_stand_behind_another_tenants_long_one() {
    let mut s = scheduler(100);
    s.add(1, request(0, 200));
    plan(&mut s);
    s.add(2, request(1, 4));
    // Both tenants have had as much now, and the long one was there before.
    plan(&mut s);
    let planned = plan(&mut s);
    let short = planned.iter().find(|p| p.id == 2).unwrap();
    assert!(short.completes && planned.iter().any(|p| p.id == 1), "the long one goes on with the rest of the step");
}

#[test]
fn an_idle_scheduler_remembers_nobody() {
    let mut s = scheduler(100);
    (0..5).for_each(|tenant| s.add(u64::from(tenant), request(tenant, 4)));
    plan(&mut s);
    (0..5).for_each(|id| s.remove(id));
    assert!(s.accounts.is_empty());
}

/// Sequences of two tenants of these weights that always have more waiting; gives the tokens that each got, none counted twice.
fn backlogged(weights: [u32; 2], lengths: &[(usize, usize)], steps: usize) -> [u64; 2] {
    let mut s = scheduler(60);
    let mut lengths = lengths.iter().copied().cycle();
    // By id: tenant, length, tokens to come, rows computed so far.
    let mut under_way: BTreeMap<u64, (u32, usize, usize, usize)> = BTreeMap::new();
    let (mut next, mut served) = (0, [0; 2]);
    for _ in 0..steps {
        for tenant in [0, 1] {
            while under_way.values().filter(|sequence| sequence.0 == tenant).count() < 8 {
                let (prompt, tokens) = lengths.next().unwrap();
                next += 1;
                s.add(next, SequenceRequest { weight: weights[tenant as usize], ..request(tenant, prompt) });
                under_way.insert(next, (tenant, prompt, tokens, 0));
            }
        }
        for p in plan(&mut s) {
            let (tenant, _, tokens, computed) = under_way.get_mut(&p.id).unwrap();
            let end = p.start + p.count;
            served[*tenant as usize] += end.saturating_sub(*computed) as u64;
            *computed = end.max(*computed);
            if p.completes {
                *tokens -= 1;
                if *tokens == 0 {
                    under_way.remove(&p.id);
                    s.remove(p.id);
                } else {
                    s.extend(p.id);
                }
            }
        }
    }
    served
}

proptest! {
    /// Tokens are shared by weight, to within what the sequences that run at once may have at their longest.
    #[test]
    fn backlogged_tenants_share_by_weight(
        lengths in prop::collection::vec((1usize..30, 1usize..12), 1..20),
        light in 1u32..4,
        heavy in 1u32..9,
    ) {
        let [a, b] = backlogged([light, heavy], &lengths, 600);
        let (a, b) = (a as f64 / f64::from(light), b as f64 / f64::from(heavy));
        let bound = 2.0 * 4.0 * (30.0 + 12.0);
        prop_assert!((a - b).abs() <= bound, "{a} and {b} for a unit of weight");
    }
}

#[test]
fn weights_one_and_three_get_a_quarter_and_three_quarters() {
    let [a, b] = backlogged([1, 3], &[(20, 8), (3, 11), (29, 2)], 5000);
    let ratio = b as f64 / a as f64;
    assert!((2.9..3.1).contains(&ratio), "{a} and {b} tokens");
}

#[test]
fn no_tenant_starves_beside_a_heavy_one_with_high_priorities() {
    let mut s = scheduler(60);
    let flood = || SequenceRequest { weight: 10, priority: 100, ..request(0, 20) };
    (1..=8).for_each(|id| s.add(id, flood()));
    plan(&mut s);
    s.add(1000, SequenceRequest { priority: -100, ..request(1, 20) });
    for step in 0..200 {
        for p in plan(&mut s) {
            if p.id == 1000 && p.completes {
                return;
            }
            if p.completes {
                s.remove(p.id);
                s.add(2000 + step * 100 + p.id % 100, flood());
            }
        }
    }
    panic!("tenant 1 got no token in 200 steps");
}

/// Sequences over a small alphabet, so that many begin alike.
fn alike() -> impl Strategy<Value = (Vec<u32>, usize, u32, i32)> {
    (prop::collection::vec(0u32..2, 1..30), 1usize..12, 0u32..3, -1i32..2)
}

/// What the model would do with the plans: of every slot of the cache the group it is for, and what its sequence's tokens are up to the
/// one whose KV it holds.
struct Cache {
    paging: Paging,
    slots: HashMap<usize, (usize, u64)>,
}

impl Cache {
    fn slot(&self, pages: &[u32], group: usize, position: usize) -> usize {
        let page = pages[position / 4 * self.paging.groups() + group];
        assert_ne!(page, NO_PAGE, "position {position} of group {group}");
        page as usize * 4 + position % 4
    }

    /// A number for the tokens up to each.
    fn prefixes(ids: &[u32]) -> Vec<u64> {
        let mix = |sum: &mut u64, id: &u32| {
            *sum = (*sum ^ u64::from(*id + 1)).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
            Some(*sum)
        };
        ids.iter().scan(1, mix).collect()
    }

    /// All that the planned rows read must be there; then the rows are.
    fn compute(&mut self, pages: &[u32], ids: &[u32], p: &ScheduledChunk) -> Result<(), TestCaseError> {
        let prefixes = Self::prefixes(ids);
        let positions = |range: Range<usize>| prefixes.iter().copied().enumerate().take(range.end).skip(range.start);
        for group in 0..self.paging.groups() {
            for (position, prefix) in positions(first_read(self.paging.window(group), p.start)..p.start) {
                let there = self.slots.get(&self.slot(pages, group, position)).copied();
                prop_assert_eq!(there, Some((group, prefix)), "position {} of {:?}", position, p);
            }
        }
        for group in 0..self.paging.groups() {
            for (position, prefix) in positions(p.start..p.start + p.count) {
                self.slots.insert(self.slot(pages, group, position), (group, prefix));
            }
        }
        Ok(())
    }

    /// As after a step that failed half way.
    fn spoil(&mut self, pages: &[u32], p: &ScheduledChunk) {
        for group in 0..self.paging.groups() {
            for position in p.start..p.start + p.count {
                self.slots.remove(&self.slot(pages, group, position));
            }
        }
    }

    /// However long it is, a sequence holds no more of a group with a window than its chunks need, and what it found when it started.
    fn check_held(&self, pages: &[u32], p: &ScheduledChunk) -> Result<(), TestCaseError> {
        for (group, window) in self.paging.windowed() {
            let held = pages.iter().skip(group).step_by(self.paging.groups()).filter(|page| **page != NO_PAGE).count();
            let read = self.paging.blocks(most_read_before(window)) + 1;
            prop_assert!(held <= self.paging.of_chunk(window) + read, "{} of {:?}", held, p);
            if p.count == 1 && p.completes && !p.start.is_multiple_of(4) {
                prop_assert!(held <= read + 1, "{} of {:?} in decoding", held, p);
            }
        }
        Ok(())
    }
}

/// Runs sequences, each with so many tokens to come, through a pool; the steps that `failing` has a zero for fail.
fn finish_all(
    config: SchedulerConfig,
    sequences: Vec<(Vec<u32>, usize, u32, i32)>,
    failing: &[u8],
) -> Result<(), TestCaseError> {
    let max_idle = config.max_idle_blocks;
    let mut cache = Cache { paging: config.paging.clone(), slots: HashMap::new() };
    let mut s = Scheduler::new(config);
    let mut left: BTreeMap<u64, (Vec<u32>, usize)> = BTreeMap::new();
    for (id, (ids, tokens, tenant, priority)) in (0..).zip(sequences) {
        s.add(id, SequenceRequest { tenant, priority, ..sharing(&ids) });
        left.insert(id, (ids, tokens));
    }
    for step in 0..10_000 {
        let planned = plan(&mut s);
        if left.is_empty() {
            break;
        }
        prop_assert!(!planned.is_empty(), "progress");
        let fails = failing.get(step) == Some(&0);
        for p in &planned {
            let pages = s.blocks_of(p).unwrap();
            let ids = &left[&p.id].0;
            prop_assert_eq!(p.completes, p.start + p.count == ids.len());
            cache.check_held(pages, p)?;
            cache.compute(pages, ids, p)?;
            if fails {
                cache.spoil(pages, p);
            }
        }
        for p in &planned {
            if fails {
                left.remove(&p.id);
                s.remove(p.id);
            } else if p.completes {
                let (ids, tokens) = left.get_mut(&p.id).unwrap();
                ids.push(ids.len() as u32 % 2);
                *tokens -= 1;
                s.publish(p.id, ids);
                if *tokens == 0 {
                    left.remove(&p.id);
                    s.remove(p.id);
                } else {
                    s.extend(p.id);
                }
            }
        }
    }
    prop_assert!(left.is_empty());
    prop_assert_eq!(s.blocks().used(), 0);
    prop_assert!(s.blocks().idle() <= max_idle);
    Ok(())
}

/// Long sequences that begin alike for a while.
fn long_and_alike() -> impl Strategy<Value = (Vec<u32>, usize, u32, i32)> {
    let ids =
        (0u32..200, prop::collection::vec(0u32..2, 1..40)).prop_map(|(alike, tail)| (0..alike).chain(tail).collect());
    (ids, 1usize..120, 0u32..3, -1i32..2)
}

/// Groups that see everything and groups that do not, in any order.
fn windows() -> impl Strategy<Value = Vec<Option<usize>>> {
    prop::collection::vec(prop::sample::select(vec![None, Some(1), Some(9), Some(70)]), 1..5)
}

proptest! {
    /// Sequences that begin alike all get every one of their tokens, in order, over KV that is theirs, whatever the pool's size and
    /// whatever fails; in the end no block is held.
    #[test]
    fn all_sequences_finish_over_their_own_kv(
        sequences in prop::collection::vec(alike(), 1..12),
        pool in 11usize..30,
        max_idle in 0usize..30,
        failing in prop::collection::vec(0u8..8, 40),
    ) {
        let config = SchedulerConfig { max_idle_blocks: max_idle, max_prefill_rows: 9, ..config(pool) };
        finish_all(config, sequences, &failing)?;
    }

    /// The same with windows, whose pages go and come, and a pool that just holds the longest.
    #[test]
    fn all_sequences_finish_where_groups_have_windows(
        windows in windows(),
        sequences in prop::collection::vec(long_and_alike(), 1..8),
        spare in 0usize..80,
        idle_percent in prop::sample::select(vec![0usize, 30, 100]),
        failing in prop::collection::vec(0u8..30, 40),
    ) {
        let paging = Paging::new(4, 24, windows.into());
        let longest = sequences.iter().map(|(ids, tokens, ..)| ids.len() + tokens).max().unwrap();
        let pool = paging.most(longest) + spare;
        let max_idle_blocks = pool * idle_percent / 100;
        let config = SchedulerConfig { paging, max_idle_blocks, max_prefill_rows: 9, ..config(pool) };
        finish_all(config, sequences, &failing)?;
    }
}

/// Two groups, one of which sees 32 positions.
fn windowed(blocks: usize) -> Scheduler {
    Scheduler::new(SchedulerConfig { paging: Paging::new(4, 24, [None, Some(32)].into()), ..config(blocks) })
}

/// Computes a sequence and some tokens of its answer; gives them all.
fn answered(s: &mut Scheduler, id: u64, mut ids: Vec<u32>, tokens: u32) -> Vec<u32> {
    s.add(id, sharing(&ids));
    for token in 0..tokens {
        while !plan(s)[0].completes {}
        ids.push(1000 + token);
        s.publish(id, &ids);
        s.extend(id);
    }
    ids
}

#[test]
fn a_long_answer_holds_what_its_window_shows_and_is_found_again() {
    let mut s = windowed(1000);
    let ids = answered(&mut s, 1, (0..100).collect(), 300);
    assert_eq!(s.blocks().used(), 100 + (400 - 320) / 4, "all of one group; of the other what 32 positions need");
    s.remove(1);
    s.add(2, sharing(&[&ids[..], &[7; 30]].concat()));
    let planned = plan(&mut s)[0];
    assert_eq!((planned.start, planned.count), (396, 24), "the last token was not computed");
    s.remove(2);
    // Where the first answer began, and within it: given back long ago, and still there.
    for (cut, found) in [(203, 200), (102, 100), (382, 380)] {
        s.add(3, sharing(&[&ids[..cut], &[7; 30]].concat()));
        assert_eq!(plan(&mut s)[0].start, found);
        s.remove(3);
    }
    assert_eq!(s.blocks().used(), 0);
}

/// Pages of a prompt that go before its first token has proved them sound are found by nobody.
#[test]
fn what_a_prompt_gives_back_before_it_has_proved_sound_is_not_found() {
    let mut s = windowed(1000);
    let ids = answered(&mut s, 1, (0..300).collect(), 1);
    s.remove(1);
    for (cut, found) in [(301, 300), (102, 0)] {
        s.add(2, sharing(&[&ids[..cut.min(ids.len())], &[7; 30]].concat()));
        assert_eq!(plan(&mut s)[0].start, found, "{cut}");
        s.remove(2);
    }
}

/// Where the pages at the end of a prefix are gone, a shorter one is found.
#[test]
fn a_prefix_ends_where_its_windows_pages_are_there() {
    let paging = Paging::new(4, 24, [Some(5), None, Some(70)].into());
    let digest = |i: usize| Digest::of(&i.to_le_bytes());
    let keys: Vec<Digest> = (0..60).map(digest).collect();
    let found_without = |of: &[(usize, Range<usize>)]| {
        let mut blocks = Blocks::new(400, 400);
        let mut held = Vec::new();
        for (group, block) in (0..3).flat_map(|group| (0..60).map(move |block| (group, block))) {
            if !of.iter().any(|(g, range)| *g == group && range.contains(&block)) {
                assert!(blocks.take(1, &mut held));
                blocks.publish(PageKey { block: keys[block], group }, held[held.len() - 1]);
            }
        }
        let mut table = Table::default();
        let found = table.start(240, &keys, &mut blocks, &paging).unwrap();
        table.release(&mut blocks);
        blocks.release(&mut held);
        assert_eq!(blocks.used(), 0);
        found / 4
    };
    assert_eq!(found_without(&[]), 60);
    assert_eq!(found_without(&[(1, 50..51)]), 50, "all of a group without a window is needed");
    assert_eq!(found_without(&[(0, 0..48)]), 60, "what no row reads is not: 48 * 4 is 192, where the last span begins");
    assert_eq!(found_without(&[(0, 48..49)]), 48);
    assert_eq!(found_without(&[(0, 0..60)]), 0);
    assert_eq!(found_without(&[(2, 0..32)]), 60, "position 240 sees 171, in the span that begins at 128");
    assert_eq!(found_without(&[(2, 32..33)]), 32);
    assert_eq!(found_without(&[(2, 40..41), (0, 0..20)]), 40);
    assert_eq!(found_without(&[(2, 40..41), (0, 0..40)]), 0);
}

#[test]
fn one_whose_adapter_loads_is_set_aside_and_comes_back_to_its_place() {
    let mut s = Scheduler::new(SchedulerConfig { max_running: 1, ..config(100) });
    (1..=3).for_each(|id| s.add(id, request(0, 4)));
    let mut planned = Vec::new();
    s.plan(&mut planned, &mut |id| if id == 1 { Readiness::Loading } else { Readiness::Ready });
    assert_eq!((planned[0].id, s.waiting()), (2, 2), "the next of the same tenant goes on");
    s.resume(1);
    s.remove(2);
    assert_eq!(planned_ids(&mut s), [1], "it is before those that came later");
    s.remove(1);
    s.add(4, request(1, 4));
    s.plan(&mut planned, &mut |id| if id == 3 { Readiness::Later } else { Readiness::Ready });
    assert_eq!(planned[0].id, 4, "a tenant that has to wait lets the others go on");
    s.remove(4);
    s.plan(&mut planned, &mut |_| Readiness::Gone);
    assert_eq!((planned.len(), s.waiting()), (0, 0));
    s.add(5, request(0, 4));
    s.plan(&mut planned, &mut |_| Readiness::Loading);
    s.remove(5);
    s.resume(5);
    assert_eq!((planned.len(), s.waiting()), (0, 0), "one that was set aside can go too");
}

#[test]
fn nobody_starts_over_for_one_that_is_not_ready() {
    let mut s = scheduler(100);
    (1..=4).for_each(|id| s.add(id, request(0, 4)));
    plan(&mut s);
    (1..=4).for_each(|id| s.extend(id));
    s.add(6, request(2, 4));
    let mut planned = Vec::new();
    s.plan(&mut planned, &mut |_| Readiness::Loading);
    assert_eq!(planned.len(), 4, "its adapter is not there, so it takes no place");
}

/// What holds an adapter of its tenant's share must not wait for a newcomer that waits for that share.
#[test]
fn one_whose_turn_had_come_goes_before_a_newcomer_that_has_to_wait() {
    let mut s = Scheduler::new(SchedulerConfig { max_running: 2, ..config(100) });
    let urgent = || SequenceRequest { priority: 9, ..request(0, 4) };
    let mut planned = Vec::new();
    // One that was set aside, and has its adapter now.
    s.add(1, request(0, 4));
    s.plan(&mut planned, &mut |_| Readiness::Loading);
    s.add(2, urgent());
    s.resume(1);
    let only_the_newcomer_waits = &mut |id| if id == 2 { Readiness::Later } else { Readiness::Ready };
    s.plan(&mut planned, only_the_newcomer_waits);
    assert_eq!(planned.iter().map(|p| p.id).collect::<Vec<_>>(), [1]);
    s.remove(2);

    // One that has started, and lost its place to another tenant.
    s.add(3, request(0, 4));
    s.extend(1);
    assert_eq!(planned_ids(&mut s), [1, 3]);
    s.add(4, request(1, 4));
    [1, 3].iter().for_each(|id| s.extend(*id));
    plan(&mut s);
    let sent_back: Vec<u64> = s.take_preempted().collect();
    assert_eq!(sent_back.len(), 1);
    s.add(2, urgent());
    s.remove(4);
    s.plan(&mut planned, only_the_newcomer_waits);
    assert!(planned.iter().any(|p| p.id == sent_back[0]), "{planned:?}");
}

/// Many tenants whose adapters are not there cost a step no more than a few, and none of them is forgotten.
#[test]
fn tenants_that_have_to_wait_are_looked_at_a_few_in_a_step() {
    let mut s = scheduler(1000);
    s.add(0, request(0, 4));
    plan(&mut s);
    const MANY: u64 = 10 * MOST_LATER as u64;
    (1..=MANY).for_each(|id| s.add(id, request(id as u32, 4)));
    let mut planned = Vec::new();
    let mut asked = std::collections::BTreeSet::new();
    for _ in 0..10 {
        s.extend(0);
        let mut in_this_step = 0;
        s.plan(&mut planned, &mut |id| {
            in_this_step += 1;
            asked.insert(id);
            Readiness::Later
        });
        assert!(in_this_step <= MOST_LATER && planned.len() == 1, "{in_this_step}");
    }
    assert_eq!(asked.len(), MANY as usize, "all have been looked at");
    s.remove(0);
    let last = &mut |id| if id == MANY { Readiness::Ready } else { Readiness::Later };
    s.plan(&mut planned, last);
    assert_eq!(planned[0].id, MANY, "where nothing runs, a step finds the one that can");
}

/// A queue of tens of thousands costs a step nothing: only the first of each tenant is looked at.
#[test]
fn a_long_queue_is_not_walked() {
    let mut s = scheduler(100);
    const MANY: u64 = 50_000;
    (0..MANY).for_each(|id| s.add(id, request((id % 7) as u32, 4)));
    let mut asked = 0;
    let mut planned = Vec::new();
    s.plan(&mut planned, &mut |_| {
        asked += 1;
        Readiness::Ready
    });
    assert!(asked <= 4, "{asked}");
    (0..MANY).rev().for_each(|id| s.remove(id));
    assert_eq!((s.waiting(), s.running()), (0, 0));
}

proptest! {
    /// The queue is the one of the definition: the least-served tenant's first by (priority, arrival), whatever comes, goes, is set aside
    /// or sent back.
    #[test]
    fn the_queue_is_in_the_order_of_its_definition(steps in prop::collection::vec((0u8..6, 0u32..3, -1i32..2), 0..60)) {
        let mut waiting = Waiting::default();
        // (served, tenant, priority, arrival, id), those set aside apart.
        let mut queued: Vec<(u64, u32, Reverse<i32>, i64, u64)> = Vec::new();
        let mut aside = Vec::new();
        let mut served = [0u64; 3];
        let (mut arrivals, mut returns) = (0i64, 0i64);
        for (id, (what, tenant, priority)) in (1u64..).zip(steps) {
            let entry = |rank| Entry { id, tenant, rank, length: 1, longest: 1, computed: 0, charged: 0, table: Table::default(), hashes: None, begun: false };
            match what {
                0 | 1 => {
                    arrivals += 1;
                    let rank = waiting.last_rank(priority);
                    waiting.push(served[tenant as usize], entry(rank));
                    queued.push((0, tenant, Reverse(priority), arrivals, id));
                }
                2 => {
                    returns -= 1;
                    let rank = waiting.first_rank(priority);
                    waiting.push(served[tenant as usize], entry(rank));
                    queued.push((0, tenant, Reverse(priority), returns, id));
                }
                3 => {
                    served[tenant as usize] += 1 + id % 3;
                    waiting.serve(tenant, served[tenant as usize]);
                }
                4 if !queued.is_empty() => {
                    let one = queued.remove(id as usize % queued.len());
                    waiting.set_aside(one.4);
                    aside.push(one);
                }
                _ => if let Some(one) = aside.pop() {
                    waiting.resume(one.4, |tenant| served[tenant as usize]);
                    queued.push(one);
                } else if let Some(one) = queued.pop() {
                    prop_assert_eq!(waiting.remove(one.4).map(|entry| entry.id), Some(one.4));
                }
            }
            queued.iter_mut().for_each(|one| one.0 = served[one.1 as usize]);
            queued.sort_unstable();
            let mut tenants: Vec<u32> = queued.iter().map(|one| one.1).collect();
            tenants.dedup();
            let firsts: Vec<u64> = tenants.iter().map(|tenant| queued.iter().find(|one| one.1 == *tenant).unwrap().4).collect();
            prop_assert_eq!(waiting.first_of_tenants().collect::<Vec<_>>(), firsts);
            prop_assert_eq!(waiting.len(), queued.len() + aside.len());
        }
    }
}
