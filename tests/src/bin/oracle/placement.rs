//! One answer to one placement case.

use godwit_coordinator::placement::cell::{Cell, CellUsage, UsageError, apply, release};
use godwit_coordinator::placement::cpu_set::CpuSet;
use godwit_coordinator::placement::explain::Rule;
use godwit_coordinator::placement::fit::{self, Order};
use godwit_coordinator::placement::guest::{CpuPolicy, Guest, PageSize};
use godwit_coordinator::placement::request;
use godwit_coordinator::placement::spec::SpecError;
use godwit_coordinator::placement::topology;
use godwit_protocol::instance::CpuTopology;
use serde_json::{Value, json};

use crate::cases::{self, BadInput};

/// Why a case has no other answer than `invalid`.
enum Invalid {
    Input(BadInput),
    Spec(SpecError),
    Rule(&'static str, String),
}

impl From<BadInput> for Invalid {
    fn from(input: BadInput) -> Self {
        Self::Input(input)
    }
}

impl From<SpecError> for Invalid {
    fn from(error: SpecError) -> Self {
        Self::Spec(error)
    }
}

type Answer = Result<Value, Invalid>;

pub(crate) fn answer(case: &Value) -> Value {
    let answered = match case["op"].as_str().unwrap_or_default() {
        "place" => place(case),
        "place_guest" => cases::guest(case).map_err(Invalid::from).and_then(|guest| fit(case, &guest)),
        "resolve" => resolve(case),
        "page_size" => page_size(case),
        "apply" => change(case, apply),
        "release" => change(case, release),
        "cpu_topology" => best_topology(case),
        "cpu_topology_all" => ranked_topologies(case),
        "cpu_topology_limits" => topology_limits(case),
        "realtime_mask" => realtime_mask(case),
        "cpu_policy" => cpu_policy(case),
        "page_size_request" => page_size_request(case),
        "cpu_list_parse" => parse_cpu_list(case),
        "cpu_list_format" => format_cpu_list(case),
        _ => Ok(json!({"outcome": "unsupported"})),
    };
    let mut answered = answered.unwrap_or_else(|invalid| {
        let (rule, detail) = match invalid {
            Invalid::Input(BadInput(key)) => ("invalid_request", format!("{key} has no usable value")),
            Invalid::Spec(error) => (error.rule.name(), error.to_string()),
            Invalid::Rule(rule, detail) => (rule, detail),
        };
        json!({"outcome": "invalid", "error": rule, "detail": detail})
    });
    answered["id"] = case["id"].clone();
    answered
}

fn resolved(case: &Value) -> Result<Option<Guest>, Invalid> {
    let flavor = cases::flavor(&case["request"])?;
    Ok(request::guest(flavor.vcpus, flavor.memory_mib, &flavor.extra_specs, &flavor.image_properties)?)
}

fn place(case: &Value) -> Answer {
    match resolved(case)? {
        Some(guest) => fit(case, &guest),
        None => Ok(json!({"outcome": "unconstrained"})),
    }
}

fn fit(case: &Value, guest: &Guest) -> Answer {
    let order = if case["order"] == "pack" { Order::Pack } else { Order::Spread };
    let (host, limits) = (cases::host(case)?, cases::limits(case)?);
    Ok(match fit::fit(&host, guest, limits.as_ref(), order) {
        Ok(cells) => json!({"outcome": "fit", "cells": cases::placed_json(&cells)}),
        Err(error) => {
            json!({"outcome": "no_fit", "rule": error.shortfall.rule.name(), "detail": error.to_string()})
        }
    })
}

fn resolve(case: &Value) -> Answer {
    Ok(match resolved(case)? {
        Some(guest) => json!({"outcome": "constrained", "guest": cases::guest_json(&guest)}),
        None => json!({"outcome": "unconstrained"}),
    })
}

fn page_size(case: &Value) -> Answer {
    let (host, guest) = (cases::host_cell(&case["host_cell"])?, cases::guest_cell(&case["guest_cell"])?);
    match fit::page_size(&host, &guest) {
        Ok(size_kib) => Ok(json!({"outcome": "fit", "page_size_kib": size_kib})),
        Err(error)
            if error.rule == Rule::PageSizeSupported && matches!(guest.page_size, Some(PageSize::Kib(_))) =>
        {
            Err(Invalid::Rule("page_size_not_supported", error.to_string()))
        }
        Err(_) => Ok(json!({"outcome": "no_fit"})),
    }
}

type Change = fn(&[Cell], &[CellUsage]) -> Result<Vec<Cell>, UsageError>;

fn change(case: &Value, change: Change) -> Answer {
    let after = change(&cases::host(case)?, &cases::usage(case)?).map_err(|error| {
        let rule = match &error {
            UsageError::PinUnknownCpu { .. } => "pin_unknown_cpu",
            UsageError::PinAlreadyUsed { .. } => "pin_already_used",
            UsageError::UnpinUnknownCpu { .. } => "unpin_unknown_cpu",
            UsageError::UnpinNotPinned { .. } => "unpin_not_pinned",
        };
        Invalid::Rule(rule, error.to_string())
    })?;
    Ok(json!({"outcome": "ok", "host": cases::host_json(&after)}))
}

fn best_topology(case: &Value) -> Answer {
    let flavor = cases::flavor(&case["request"])?;
    let wish = request::topology_wish(&flavor.extra_specs, &flavor.image_properties)?;
    let allow_threads = case["allow_threads"].as_bool().unwrap_or(true);
    let best = wish.best(flavor.vcpus, allow_threads).ok_or_else(impossible)?;
    Ok(json!({"outcome": "ok", "best": best}))
}

fn ranked_topologies(case: &Value) -> Answer {
    let maximum = &case["maximum"];
    let maximum = CpuTopology {
        sockets: cases::number(maximum, "sockets")?,
        cores: cases::number(maximum, "cores")?,
        threads: cases::number(maximum, "threads")?,
    };
    let allow_threads = case["allow_threads"].as_bool().unwrap_or(true);
    let ranked = topology::possible(cases::number(case, "vcpus")?, maximum, allow_threads);
    if ranked.is_empty() { Err(impossible()) } else { Ok(json!({"outcome": "ok", "ranked": ranked})) }
}

fn impossible() -> Invalid {
    Invalid::Rule("topology_impossible", "no topology within the maxima".to_owned())
}

fn topology_limits(case: &Value) -> Answer {
    let flavor = cases::flavor(&case["request"])?;
    let wish = request::topology_wish(&flavor.extra_specs, &flavor.image_properties)?;
    Ok(json!({"outcome": "ok", "preferred": wish.preferred, "maximum": wish.maximum}))
}

fn realtime_mask(case: &Value) -> Answer {
    let flavor = cases::flavor(&case["request"])?;
    let cpus = request::realtime_vcpus(flavor.vcpus, &flavor.extra_specs, &flavor.image_properties)?;
    Ok(json!({"outcome": "ok", "cpus": cpus.as_ref().map(cases::cpu_json)}))
}

fn cpu_policy(case: &Value) -> Answer {
    let flavor = cases::flavor(&case["request"])?;
    let policy = request::cpu_policy(&flavor.extra_specs, &flavor.image_properties)?;
    Ok(json!({"outcome": "ok", "cpu_policy": policy.map(CpuPolicy::name)}))
}

fn page_size_request(case: &Value) -> Answer {
    let flavor = cases::flavor(&case["request"])?;
    let size = request::page_size(&flavor.extra_specs, &flavor.image_properties)?;
    Ok(json!({"outcome": "ok", "page_size": cases::page_size_json(size)}))
}

fn parse_cpu_list(case: &Value) -> Answer {
    let text = case["text"].as_str().ok_or(BadInput("text"))?;
    let cpus = CpuSet::parse(text).map_err(|error| Invalid::Rule("invalid_cpu_list", error.to_string()))?;
    Ok(json!({"outcome": "ok", "cpus": cases::cpu_json(&cpus)}))
}

fn format_cpu_list(case: &Value) -> Answer {
    let cpus = cases::cpus(case, "cpus")?;
    let ranges = case["ranges"].as_bool().unwrap_or(true);
    let text = if ranges { cpus.to_string() } else { cpus.to_plain_list() };
    Ok(json!({"outcome": "ok", "text": text}))
}
