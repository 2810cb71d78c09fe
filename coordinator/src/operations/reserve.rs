//! Holding a planned place on its host. The host decides: a placement is only an answer.

use super::{Context, StepError};
use crate::fleet::Fleet;
use crate::reconcile;
use godwit_protocol::error::ErrorKind;
use godwit_protocol::id::HostId;
use godwit_protocol::request::{AgentReply, AgentRequest};
use godwit_protocol::reservation::{Reservation, ReservePlan};

/// A host that refuses more often than this because it keeps changing is given up for this time.
const MAX_STALE: usize = 5;

/// What the host made of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It is held.
    Held,
    /// The host is not as it was when the plan was made; its newest report is in the fleet now. Place again.
    Changed,
    /// The host refuses. Place again, elsewhere.
    Refused,
}

/// The generation of the host's report that a plan made now is made from; 0 when it gave none.
pub(super) fn generation(fleet: &Fleet, host: HostId) -> u64 {
    fleet.observed.get(&host).and_then(|o| o.report.as_ref()).map_or(0, |report| report.generation)
}

/// Asks `host` to hold `reservation`, planned from its report of `generation`, beside what the instance holds there
/// already if it is told so. `stale` counts how often plans of
/// this step have been out of date.
///
/// # Errors
/// As [`Context::ask`], a refusal excepted.
pub(super) async fn hold(
    context: &Context,
    host: HostId,
    reservation: Reservation,
    (generation, beside): (u64, bool),
    stale: &mut usize,
) -> Result<Verdict, StepError> {
    let plan = ReservePlan { reservation, generation, beside };
    let error = match context.ask(host, AgentRequest::Reserve(plan)).await {
        Ok(_) => return Ok(Verdict::Held),
        Err(StepError::Host { error, .. }) if error.kind == ErrorKind::Refused => error,
        Err(other) => return Err(other),
    };
    tracing::info!(instance = %context.instance, %host, %error, "a host refused; placing again");
    if !error.is_stale() || *stale >= MAX_STALE {
        return Ok(Verdict::Refused);
    }
    *stale += 1;
    if let AgentReply::Report(report) = context.ask(host, AgentRequest::Report).await? {
        reconcile::report(&context.app, *report).await;
    }
    Ok(Verdict::Changed)
}
