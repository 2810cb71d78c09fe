//! Requests that run: one after the other for each instance and network, and on their own, whatever becomes of the
//! connection they came by. The same request again joins the one that runs.

use godwit_protocol::error::{ErrorKind, RequestError};
use godwit_protocol::id::{ImageId, InstanceId, NetworkId};
use godwit_protocol::operation::Progress;
use godwit_protocol::request::{AgentReply, AgentRequest};
use prometheus::{HistogramOpts, HistogramVec, IntCounterVec, Opts, Registry};
use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// Requests that may run or wait at once.
const MAX_CALLS: usize = 1024;

/// How a request ends.
pub type Answer = Result<AgentReply, RequestError>;

/// How far a call is.
#[derive(Clone, Debug)]
pub enum CallState {
    /// It waits or runs; the newest progress, if it told any.
    Running(Option<Progress>),
    /// It is over.
    Finished(Answer),
}

/// Takes a running call's progress; only the newest is kept.
pub struct ProgressSink(watch::Sender<CallState>);

impl ProgressSink {
    /// Tells how far the call is.
    pub fn send(&self, progress: Progress) {
        self.0.send_replace(CallState::Running(Some(progress)));
    }
}

/// Does a request. It blocks, and runs on a thread where it may.
pub type Run = Arc<dyn Fn(&AgentRequest, &ProgressSink) -> Answer + Send + Sync>;

/// Told of each request at once, before it waits its turn, so that it can hurry on the one that runs. It must not
/// block.
pub type Herald = Arc<dyn Fn(&AgentRequest) + Send + Sync>;

/// What calls must not run at the same time for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Subject {
    Instance(InstanceId),
    Network(NetworkId),
    Image(ImageId),
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Instance(id) => write!(f, "instance {id}"),
            Self::Network(id) => write!(f, "network {id}"),
            Self::Image(id) => write!(f, "image {id}"),
        }
    }
}

/// None: it reads, or it must reach a call that runs; it waits for nothing.
fn subject(request: &AgentRequest) -> Option<Subject> {
    use AgentRequest as R;
    Some(match request {
        R::Report
        | R::Console { .. }
        | R::InstanceState(_)
        | R::FindImage(_)
        // One image may go to several pools at once; each way ends when its target ceases to wait.
        | R::SendImage(_)
        | R::CancelDisk(_)
        | R::CancelMigration(_)
        | R::TakeCertificate(_) => {
            return None;
        }
        R::EnsureNetwork(wanted) => Subject::Network(wanted.network),
        R::RemoveNetwork { network, .. } => Subject::Network(*network),
        R::AwaitImage(arrival) | R::SettleImage(arrival) => Subject::Image(arrival.image),
        R::DropImage { image, .. } => Subject::Image(*image),
        R::Reserve(plan) => Subject::Instance(plan.reservation.instance),
        R::Exchange(reservation) => Subject::Instance(reservation.instance),
        R::CreateDisk(disk) => Subject::Instance(disk.instance),
        R::GrowDisk(disk) => Subject::Instance(disk.instance),
        R::MarkDisk(mark) => Subject::Instance(mark.instance),
        R::AwaitDisk(arrival) => Subject::Instance(arrival.instance),
        R::SendDisk(departure) => Subject::Instance(departure.instance),
        R::DefineInstance(spec) => Subject::Instance(spec.instance),
        R::PrepareMigration(target) => Subject::Instance(target.spec.instance),
        R::Migrate(source) => Subject::Instance(source.instance),
        R::Release(instance)
        | R::ReleaseBeside(instance)
        | R::RestoreDisk(instance)
        | R::DropOldDisk(instance)
        | R::DeleteDisk(instance)
        | R::LeaveDisk(instance)
        | R::StartInstance(instance)
        | R::RemoveInstance(instance)
        | R::StopInstance { instance, .. }
        | R::RebootInstance { instance, .. }
        | R::PauseInstance { instance, .. }
        | R::DiscardMigration { instance, .. } => Subject::Instance(*instance),
    })
}

/// The newest call of a subject.
struct Newest {
    request: AgentRequest,
    state: watch::Receiver<CallState>,
}

struct Shared {
    run: Run,
    herald: Herald,
    newest: Mutex<Newests>,
    /// The newest failure: retries that fail alike are told once.
    failure: Mutex<Option<(AgentRequest, RequestError)>>,
    requests: IntCounterVec,
    seconds: HistogramVec,
}

#[derive(Default)]
struct Newests {
    by_subject: HashMap<Subject, Newest>,
    calls: usize,
}

/// All calls of an agent.
#[derive(Clone)]
pub struct Calls(Arc<Shared>);

impl Calls {
    /// Calls announced by `herald` and done by `run`, counted in `registry`.
    ///
    /// # Errors
    /// When `registry` holds such metrics already.
    pub fn new(run: Run, herald: Herald, registry: &Registry) -> Result<Self, prometheus::Error> {
        let requests = IntCounterVec::new(
            Opts::new("godwit_agent_requests_total", "Requests of the coordinator that ended."),
            &["request", "outcome"],
        )?;
        let seconds = HistogramVec::new(
            HistogramOpts::new("godwit_agent_request_seconds", "Time that requests took, waiting included.")
                .buckets(vec![0.001, 0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 60.0, 300.0]),
            &["request"],
        )?;
        registry.register(Box::new(requests.clone()))?;
        registry.register(Box::new(seconds.clone()))?;
        Ok(Self(Arc::new(Shared {
            run,
            herald,
            newest: Mutex::default(),
            failure: Mutex::default(),
            requests,
            seconds,
        })))
    }

    /// Starts `request`, or joins the same one if that is the newest of its instance or network and not over.
    /// Must be called inside a tokio runtime.
    pub fn submit(&self, request: AgentRequest) -> watch::Receiver<CallState> {
        (self.0.herald)(&request);
        let subject = subject(&request);
        let mut newest = self.0.lock();
        let before = match subject.and_then(|s| newest.by_subject.get(&s)) {
            Some(call) if call.request == request => return call.state.clone(),
            Some(call) => Some(call.state.clone()),
            None => None,
        };
        if newest.calls >= MAX_CALLS {
            let error = RequestError::new(ErrorKind::Unavailable, "too many requests wait on this host");
            return watch::channel(CallState::Finished(Err(error))).1;
        }
        newest.calls += 1;
        let (sender, state) = watch::channel(CallState::Running(None));
        if let Some(subject) = subject {
            newest.by_subject.insert(subject, Newest { request: request.clone(), state: state.clone() });
        }
        drop(newest);
        tokio::spawn(self.clone().work(subject, request, before, sender));
        state
    }

    async fn work(
        self,
        subject: Option<Subject>,
        request: AgentRequest,
        before: Option<watch::Receiver<CallState>>,
        sender: watch::Sender<CallState>,
    ) {
        let begun = Instant::now();
        if let Some(mut before) = before {
            // An error means that it is over too.
            let _ = before.wait_for(|state| matches!(state, CallState::Finished(_))).await;
        }
        let run = self.0.run.clone();
        let sink = ProgressSink(sender.clone());
        let asked = request.clone();
        let done = tokio::task::spawn_blocking(move || run(&asked, &sink)).await;
        let answer = done.unwrap_or_else(|_| {
            Err(RequestError::new(ErrorKind::Internal, "the agent failed inside; its log says where"))
        });
        self.0.observe(request, subject, &answer, begun.elapsed());
        let mut newest = self.0.lock();
        newest.calls -= 1;
        if let Some(subject) = subject
            && newest
                .by_subject
                .get(&subject)
                .is_some_and(|call| call.state.same_channel(&sender.subscribe()))
        {
            newest.by_subject.remove(&subject);
        }
        drop(newest);
        sender.send_replace(CallState::Finished(answer));
    }
}

impl Shared {
    /// Counts and logs the end of a call.
    fn observe(&self, request: AgentRequest, subject: Option<Subject>, answer: &Answer, took: Duration) {
        let name = request.name();
        let seconds = took.as_secs_f64();
        self.seconds.with_label_values(&[name]).observe(seconds);
        self.requests.with_label_values(&[name, outcome(answer)]).inc();
        let subject = subject.map(tracing::field::display);
        let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        match answer {
            Ok(_) => tracing::info!(subject, seconds, "{name} is done"),
            Err(error) => {
                let new = Some((request, error.clone()));
                if *failure == new {
                    tracing::debug!(subject, seconds, "{name} failed again: {error}");
                } else {
                    tracing::warn!(subject, seconds, kind = ?error.kind, "{name} failed: {error}");
                    *failure = new;
                }
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Newests> {
        self.newest.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn outcome(answer: &Answer) -> &'static str {
    match answer.as_ref().map_err(|e| e.kind) {
        Ok(_) => "done",
        Err(ErrorKind::Refused) => "refused",
        Err(ErrorKind::NotFound) => "not_found",
        Err(ErrorKind::Conflict) => "conflict",
        Err(ErrorKind::Unavailable) => "unavailable",
        Err(ErrorKind::NoSpace) => "no_space",
        Err(ErrorKind::Invalid) => "invalid",
        Err(ErrorKind::Damaged) => "damaged",
        Err(ErrorKind::Cancelled) => "cancelled",
        Err(ErrorKind::Internal) => "internal",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    async fn end(mut state: watch::Receiver<CallState>) -> Answer {
        let over = state.wait_for(|s| matches!(s, CallState::Finished(_)));
        match tokio::time::timeout(Duration::from_secs(10), over).await.unwrap().unwrap().clone() {
            CallState::Finished(answer) => answer,
            CallState::Running(_) => unreachable!(),
        }
    }

    /// Calls that tell `begun` their request and then wait for a word on the returned sender.
    fn gated() -> (Calls, mpsc::Sender<()>, mpsc::Receiver<AgentRequest>, Registry) {
        let (gate, opened) = mpsc::channel();
        let (begin, begun) = mpsc::channel();
        let opened = Mutex::new(opened);
        let run: Run = Arc::new(move |request, progress| {
            begin.send(request.clone()).unwrap();
            progress.send(Progress::Copy { done_bytes: 1, total_bytes: 2 });
            opened.lock().unwrap().recv().unwrap();
            Ok(AgentReply::Done)
        });
        let registry = Registry::new();
        (Calls::new(run, Arc::new(|_| ()), &registry).unwrap(), gate, begun, registry)
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn the_same_request_joins_the_one_that_runs_and_another_waits_for_it() {
        let (calls, gate, begun, _registry) = gated();
        let instance = InstanceId::random();
        let first = calls.submit(AgentRequest::StartInstance(instance));
        assert_eq!(begun.recv().unwrap(), AgentRequest::StartInstance(instance));
        let joined = calls.submit(AgentRequest::StartInstance(instance));
        assert!(joined.same_channel(&first));
        let removed = calls.submit(AgentRequest::RemoveInstance(instance));
        // After the removal it is not the same start any more.
        let again = calls.submit(AgentRequest::StartInstance(instance));
        assert!(begun.recv_timeout(Duration::from_millis(50)).is_err(), "something overtook the first");
        for _ in 0..3 {
            gate.send(()).unwrap();
        }
        for state in [first, joined, removed, again] {
            assert_eq!(end(state).await, Ok(AgentReply::Done));
        }
        assert_eq!(begun.recv().unwrap(), AgentRequest::RemoveInstance(instance));
        assert_eq!(begun.recv().unwrap(), AgentRequest::StartInstance(instance));
        assert!(begun.try_recv().is_err());
        assert!(calls.0.lock().by_subject.is_empty());
        assert_eq!(calls.0.lock().calls, 0);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn another_instance_and_a_reading_request_wait_for_nobody() {
        let (calls, gate, begun, _registry) = gated();
        let instance = InstanceId::random();
        let states = [
            calls.submit(AgentRequest::StartInstance(instance)),
            calls.submit(AgentRequest::StartInstance(InstanceId::random())),
            calls.submit(AgentRequest::InstanceState(instance)),
        ];
        for _ in 0..3 {
            begun.recv_timeout(Duration::from_secs(10)).unwrap();
        }
        for _ in 0..3 {
            gate.send(()).unwrap();
        }
        for state in states {
            end(state).await.unwrap();
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_panic_is_an_internal_error_and_the_next_request_works() {
        let registry = Registry::new();
        let run: Run = Arc::new(|request, _| match request {
            AgentRequest::StartInstance(_) => panic!("a test's panic"),
            _ => Ok(AgentReply::Done),
        });
        let calls = Calls::new(run, Arc::new(|_| ()), &registry).unwrap();
        let instance = InstanceId::random();
        let error = end(calls.submit(AgentRequest::StartInstance(instance))).await.unwrap_err();
        assert_eq!(error.kind, ErrorKind::Internal);
        assert_eq!(end(calls.submit(AgentRequest::RemoveInstance(instance))).await, Ok(AgentReply::Done));
        let text = prometheus::TextEncoder::new().encode_to_string(&registry.gather()).unwrap();
        assert!(
            text.contains(r#"godwit_agent_requests_total{outcome="internal",request="start_instance"} 1"#)
        );
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn past_the_bound_requests_are_turned_away_and_not_queued() {
        let (calls, gate, _begun, _registry) = gated();
        calls.0.lock().calls = MAX_CALLS;
        let error = end(calls.submit(AgentRequest::Report)).await.unwrap_err();
        assert_eq!(error.kind, ErrorKind::Unavailable);
        calls.0.lock().calls = 0;
        gate.send(()).unwrap();
        end(calls.submit(AgentRequest::Report)).await.unwrap();
    }
}
