//! Figures of the hub, for Prometheus and for tests.

use std::time::Duration;

use crate::hub::Tier;

/// What is in memory now.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct HubStats {
    /// Versions ready to be leased.
    pub resident: usize,
    /// Bytes of them, of those that load, and of deleted ones that are still leased.
    pub resident_bytes: u64,
    /// Bytes of versions that are kept in host memory.
    pub host_bytes: u64,
    /// Leases that are held; a lease and its clones count once.
    pub leases: usize,
}

impl HubStats {
    /// Shows them as gauges.
    pub fn show(&self) {
        metrics::gauge!("tenora_adapters_resident").set(self.resident as f64);
        metrics::gauge!("tenora_adapters_resident_bytes").set(self.resident_bytes as f64);
        metrics::gauge!("tenora_adapters_host_bytes").set(self.host_bytes as f64);
        metrics::gauge!("tenora_adapter_leases").set(self.leases as f64);
    }
}

/// A version has come to the device from another tier.
pub(super) fn count_load(from: Tier, took: Duration) {
    metrics::counter!("tenora_adapter_loads_total", "from" => name(from)).increment(1);
    metrics::histogram!("tenora_adapter_load_seconds", "from" => name(from)).record(took.as_secs_f64());
}

/// A version has left a tier for want of room.
pub(super) fn count_eviction(of: Tier) {
    metrics::counter!("tenora_adapter_evictions_total", "from" => name(of)).increment(1);
}

fn name(tier: Tier) -> &'static str {
    match tier {
        Tier::Device => "device",
        Tier::Host => "host",
        Tier::Disk => "disk",
    }
}
