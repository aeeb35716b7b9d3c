//! Rows of the catalogue as messages.

use super::{or_empty, timestamp};
use crate::api::proto as pb;
use crate::data::{Findings, Report, Shown};
use crate::hub::{Residency, Tier};
use crate::ids::{KeyName, TenantId};
use crate::request::ParityReport;
use crate::safety::PhraseMatch;
use crate::store::{AdapterRow, DatasetKind, DatasetRow, KeyRow, PolicyRow, TenantRow, UsageRow, VersionRow};

pub fn adapter_message(row: AdapterRow, live: Option<Residency>) -> pb::Adapter {
    pb::Adapter {
        name: row.name.to_string(),
        live_version: or_empty(row.live),
        etag: row.etag,
        create_time: timestamp(row.create_time),
        update_time: timestamp(row.update_time),
        residency: live.map(residency),
    }
}

fn residency(residency: Residency) -> pb::Residency {
    let tier = match residency.tier {
        Tier::Device => pb::Tier::Device,
        Tier::Host => pb::Tier::Host,
        Tier::Disk => pb::Tier::Disk,
    };
    pb::Residency {
        tier: tier.into(),
        memory_bytes: residency.memory_bytes,
        last_use_time: residency.last_use.and_then(timestamp),
        // No load takes the centuries that a duration could not hold.
        last_load_duration: residency.last_load.and_then(|took| took.try_into().ok()),
    }
}

pub fn version(row: VersionRow, place: Residency) -> pb::AdapterVersion {
    pb::AdapterVersion {
        name: row.name.to_string(),
        digest: row.digest.to_string(),
        base_digest: row.base_digest.to_string(),
        template_digest: row.template_digest.to_string(),
        size_bytes: row.size_bytes,
        kind: row.kind.name().to_owned(),
        rank: row.rank,
        virtual_tokens: row.virtual_tokens,
        target_modules: row.targets,
        no_effect: row.parity.no_effect,
        parity: Some(parity(row.parity)),
        training_job: or_empty(row.job),
        create_time: timestamp(row.create_time),
        metrics: row.metrics.into_iter().collect(),
        residency: Some(residency(place)),
        live: row.live,
        held_reason: row.held_reason.unwrap_or_default(),
        note: row.note.unwrap_or_default(),
    }
}

fn parity(report: ParityReport) -> pb::ParityReport {
    pb::ParityReport {
        tokens: report.tokens,
        mean_abs_difference: report.mean_abs_difference,
        mean_abs_effect: report.mean_abs_effect,
        threshold: report.threshold,
    }
}

pub fn dataset(row: DatasetRow) -> pb::Dataset {
    let kind = match row.kind {
        DatasetKind::Sft => pb::DatasetKind::Sft,
        DatasetKind::Preferences => pb::DatasetKind::Preferences,
    };
    pb::Dataset {
        name: row.name.to_string(),
        kind: kind.into(),
        records: u32::try_from(row.records).unwrap_or(u32::MAX),
        size_bytes: row.size_bytes,
        digest: row.digest.to_string(),
        create_time: timestamp(row.create_time),
        content: None,
    }
}

/// What an upload answers.
pub fn uploaded((row, findings): (DatasetRow, Findings)) -> pb::Dataset {
    pb::Dataset { content: Some(content(findings)), ..dataset(row) }
}

fn content(findings: Findings) -> pb::DatasetContent {
    let named = |(name, count): (String, u64)| pb::NamedCount { name, count };
    let shapes = findings.shapes.into_iter().map(|(shape, count)| (shape.name().to_owned(), count));
    pb::DatasetContent {
        format: findings.format,
        shapes: shapes.map(named).collect(),
        ignored_fields: findings.ignored.into_iter().map(named).collect(),
        more_ignored_fields: findings.more_ignored,
        control_token_mentions: findings.mentions,
        empty_answers: findings.empty_answers,
    }
}

pub fn report(report: Report) -> pb::DatasetReport {
    pb::DatasetReport {
        dataset: Some(dataset(report.dataset)),
        tokens: report.tokens,
        loss_tokens: report.loss_tokens,
        longest: report.longest,
        duplicates: report.duplicates,
        too_long: narrow(report.too_long.count),
        content: Some(content(report.findings)),
        max_length: narrow(report.max_length as u64),
        too_long_records: report.too_long.first.into_iter().map(record_length).collect(),
        rendered: report.shown.into_iter().map(rendered).collect(),
    }
}

fn narrow(count: u64) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

fn record_length((line, tokens): (u64, usize)) -> pb::RecordLength {
    pb::RecordLength { line, tokens: narrow(tokens as u64) }
}

fn rendered(shown: Shown) -> pb::RenderedSequence {
    let spans = shown.spans.into_iter().map(|span| pb::RenderedSpan {
        text: span.text,
        token_ids: span.ids,
        in_loss: span.in_loss,
    });
    pb::RenderedSequence { record: shown.record, line: shown.line, answer: shown.answer.into(), spans: spans.collect() }
}

pub fn tenant(row: TenantRow) -> pb::Tenant {
    pb::Tenant {
        name: row.id.to_string(),
        display_name: row.display_name,
        create_time: timestamp(row.create_time),
        weight: row.weight,
        etag: row.etag,
    }
}

pub fn key(owner: &TenantId, row: KeyRow) -> pb::ApiKey {
    pb::ApiKey {
        name: KeyName { tenant: owner.clone(), key: row.id }.to_string(),
        display_name: row.display_name,
        create_time: timestamp(row.created),
        revoke_time: row.revoked.and_then(timestamp),
    }
}

pub fn usage(owner: &TenantId, row: UsageRow) -> pb::TenantUsage {
    pb::TenantUsage {
        name: owner.to_string(),
        requests: row.requests,
        prompt_tokens: row.prompt_tokens,
        completion_tokens: row.completion_tokens,
        training_tokens: row.training_tokens,
    }
}

pub fn policy(owner: &TenantId, row: PolicyRow) -> pb::SafetyPolicy {
    pb::SafetyPolicy { name: format!("{owner}/safetyPolicy"), blocked_phrases: row.phrases, etag: row.etag }
}

pub fn phrase_match(found: PhraseMatch) -> pb::PhraseMatch {
    pb::PhraseMatch { phrase: found.phrase, start: found.start as u64, end: found.end as u64 }
}
