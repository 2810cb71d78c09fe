//! `/metrics`: what the coordinator knows and does, counted when it is asked for.

use crate::app::Shared;
use crate::drift;
use crate::ledger::now;
use crate::reconcile;
use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{Encoder, IntCounter, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder};

/// Figures of the fleet. They are derived from the state at each scrape: there is no second count that could differ.
struct FleetCollector {
    app: Shared,
    hosts: IntGaugeVec,
    instances: IntGaugeVec,
    operations: IntGaugeVec,
    drifts: IntGaugeVec,
    damaged_images: IntGauge,
    connections: IntGauge,
}

impl FleetCollector {
    fn new(app: Shared) -> Result<Self, prometheus::Error> {
        let gauges =
            |name: &str, help: &str, labels: &[&str]| IntGaugeVec::new(Opts::new(name, help), labels);
        Ok(Self {
            app,
            hosts: gauges("godwit_coordinator_hosts", "Hosts by state (up, late, lost).", &["state"])?,
            instances: gauges(
                "godwit_coordinator_instances",
                "Instances by status (building, active, paused, stopped, error).",
                &["status"],
            )?,
            operations: gauges(
                "godwit_coordinator_operations",
                "Operations in the journal by verb and phase; ended ones are kept for a while.",
                &["verb", "phase"],
            )?,
            drifts: gauges(
                "godwit_coordinator_drifts",
                "What does not run where it was reserved, by kind.",
                &["kind"],
            )?,
            damaged_images: IntGauge::new(
                "godwit_coordinator_damaged_images",
                "Images that downloads found not to be what was uploaded, until they are deleted or the coordinator ends.",
            )?,
            connections: IntGauge::new("godwit_coordinator_agent_connections", "Open channels to agents.")?,
        })
    }
}

impl Collector for FleetCollector {
    fn desc(&self) -> Vec<&Desc> {
        let vectors = [&self.hosts, &self.instances, &self.operations, &self.drifts];
        let gauges = [&self.connections, &self.damaged_images].into_iter().flat_map(Collector::desc);
        vectors.into_iter().flat_map(Collector::desc).chain(gauges).collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let vectors = [&self.hosts, &self.instances, &self.operations, &self.drifts];
        vectors.into_iter().for_each(IntGaugeVec::reset);
        for state in ["up", "late", "lost"] {
            self.hosts.with_label_values(&[state]);
        }
        let now = now();
        self.app.ledger.read(|fleet| {
            for host in fleet.hosts.keys() {
                let state = reconcile::liveness(fleet, *host, self.app.config.heartbeat_ms, now);
                self.hosts.with_label_values(&[state.as_str()]).inc();
            }
            for instance in fleet.instances.values() {
                self.instances.with_label_values(&[instance.status.name()]).inc();
            }
            for (_, drift) in drift::list(fleet) {
                self.drifts.with_label_values(&[drift.aspect.name()]).inc();
            }
            for operation in fleet.operations.values() {
                self.operations.with_label_values(&[operation.verb.name(), operation.phase.name()]).inc();
            }
        });
        self.connections.set(i64::try_from(self.app.agents.connected()).unwrap_or(i64::MAX));
        let damaged = self.app.ledger.read(|fleet| fleet.damages.len());
        self.damaged_images.set(i64::try_from(damaged).unwrap_or(i64::MAX));
        let gauges = [&self.connections, &self.damaged_images].into_iter().flat_map(Collector::collect);
        vectors.into_iter().flat_map(Collector::collect).chain(gauges).collect()
    }
}

/// Registers the fleet's figures and the store's commits.
///
/// # Errors
/// When the registry has them already.
pub fn register(app: &Shared, registry: &Registry) -> Result<(), prometheus::Error> {
    registry.register(Box::new(FleetCollector::new(app.clone())?))?;
    registry.register(Box::new(StoreCollector::new(app.clone())?))
}

/// Transactions of the state database.
struct StoreCollector {
    app: Shared,
    commits: IntCounter,
}

impl StoreCollector {
    fn new(app: Shared) -> Result<Self, prometheus::Error> {
        let help = "Transactions on disk; changes that wait together share one.";
        Ok(Self { app, commits: IntCounter::new("godwit_coordinator_store_commits_total", help)? })
    }
}

impl Collector for StoreCollector {
    fn desc(&self) -> Vec<&Desc> {
        self.commits.desc()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let commits = self.app.ledger.commits();
        self.commits.inc_by(commits.saturating_sub(self.commits.get()));
        self.commits.collect()
    }
}

/// `GET /metrics` in Prometheus' text form.
pub fn router(registry: Registry) -> Router {
    Router::new().route("/metrics", get(scrape)).with_state(registry)
}

async fn scrape(State(registry): State<Registry>) -> Response {
    let mut text = Vec::new();
    match TextEncoder::new().encode(&registry.gather(), &mut text) {
        Ok(()) => ([(CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::testing::Api;
    use crate::fleet::host::Host;
    use godwit_protocol::id::HostId;

    #[test]
    fn every_series_of_an_alert_is_described() {
        let docs = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs");
        let read = |name: &str| std::fs::read_to_string(format!("{docs}/{name}")).unwrap();
        let (rules, described) = (read("alerts/placement.yml"), read("metrics.md"));
        let rules: serde_yaml_ng::Value = serde_yaml_ng::from_str(&rules).unwrap();
        let rules = rules["groups"][0]["rules"].as_sequence().unwrap();
        assert!(rules.len() > 2);
        for rule in rules {
            let expression = rule["expr"].as_str().unwrap();
            let words = expression.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
            let series: Vec<&str> = words.filter(|word| word.starts_with("godwit_")).collect();
            assert!(!series.is_empty(), "{expression}");
            for series in series {
                assert!(described.contains(&format!("`{series}`")), "{series} is not in metrics.md");
            }
            assert!(rule["annotations"]["summary"].is_string(), "{expression}");
        }
    }

    #[tokio::test]
    async fn a_scrape_shows_the_fleet_as_it_is_now() {
        let api = Api::new().await;
        let registry = Registry::new();
        register(&api.app, &registry).unwrap();
        let text = || {
            let mut text = Vec::new();
            TextEncoder::new().encode(&registry.gather(), &mut text).unwrap();
            String::from_utf8(text).unwrap()
        };
        assert!(text().contains("godwit_coordinator_hosts{state=\"lost\"} 0"));
        let before = api.app.ledger.commits();
        let host = Host {
            id: HostId::random(),
            number: 1,
            name: "h1".into(),
            enabled: true,
            disabled_reason: None,
            drain: None,
            inventory: None,
            joined_at: now(),
            key_digest: String::new(),
        };
        api.app.ledger.change::<_, crate::error::Error>(|_| Ok((vec![host.into()], ()))).await.unwrap();
        let shown = text();
        assert!(shown.contains("godwit_coordinator_hosts{state=\"lost\"} 1"), "{shown}");
        assert!(shown.contains(&format!("godwit_coordinator_store_commits_total {}", before + 1)), "{shown}");
    }
}
