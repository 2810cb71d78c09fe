//! What an agent can be asked, in one `match`. Everything here blocks, and may be repeated.

use crate::calls::{Answer, ProgressSink};
use crate::crash::{self, Side};
use crate::host::Host;
use crate::hypervisor::{Cancel, DomainContext, Hypervisor};
use crate::identity::HostIdentity;
use crate::migration::Migrations;
use crate::moves::DiskMoves;
use crate::report::{Reporter, Told};
use crate::reservations::ReserveError;
use crate::state::State;
use godwit_protocol::error::{ErrorKind, RequestError, chain};
use godwit_protocol::id::{HostId, InstanceId};
use godwit_protocol::instance::{InstanceSpec, InstanceState};
use godwit_protocol::migration::MigrationSource;
use godwit_protocol::network::NetworkWanted;
use godwit_protocol::port::tap_name;
use godwit_protocol::request::{AgentReply, AgentRequest};
use godwit_protocol::reservation::{Reservation, ReservePlan};
use std::sync::Arc;
use std::time::Duration;

/// The agent of one host.
pub struct Agent {
    /// The host and what is on it.
    pub host: Arc<Host>,
    /// What runs its guests.
    pub hypervisor: Arc<dyn Hypervisor>,
    /// Both halves of migrations.
    pub migrations: Migrations,
    /// Both ends of moves of disks.
    pub moves: DiskMoves,
    /// Who the host is.
    pub identity: Arc<HostIdentity>,
    /// What is kept on disk.
    pub state: Arc<State>,
    /// Tells what changed.
    pub reporter: Arc<Reporter>,
}

impl Agent {
    /// Does one request, on a thread of a tokio runtime that may block.
    ///
    /// # Errors
    /// What the coordinator is to know; the host is then as it was, or the same request again makes it whole.
    pub fn handle(&self, request: &AgentRequest, progress: &ProgressSink) -> Answer {
        let point = format!("agent.{}", request.name());
        crash::point(&point, Side::Before);
        let answer = self.act(request, progress);
        crash::point(&point, Side::After);
        if !matches!(
            request,
            AgentRequest::Report
                | AgentRequest::Console { .. }
                | AgentRequest::InstanceState(_)
                | AgentRequest::FindImage(_)
        ) {
            self.reporter.mark_changed();
        }
        answer
    }

    /// Hears of a request before its turn: one that discards a migration need not wait for the migration to end by
    /// itself.
    pub fn hear(&self, request: &AgentRequest) {
        if let AgentRequest::DiscardMigration { migration, .. } = request {
            // Not running, as a rule.
            let _ = self.migrations.cancel(*migration);
        }
    }

    fn act(&self, request: &AgentRequest, progress: &ProgressSink) -> Answer {
        use AgentRequest as R;
        let pool = &self.host.pool;
        match request {
            R::Report => return self.report(),
            R::Reserve(plan) => self.reserve(plan)?,
            R::Release(instance) => {
                self.host.reservations.release(*instance).map_err(not_kept)?;
            }
            R::Exchange(wanted) => {
                self.host.reservations.exchange(wanted)?;
            }
            R::ReleaseBeside(instance) => {
                self.host.reservations.release_beside(*instance).map_err(not_kept)?;
            }
            R::CreateDisk(disk) => {
                let format = pool.create_disk(disk, &mut |p| progress.send(p), &Cancel::default())?;
                return Ok(AgentReply::Disk { format });
            }
            R::CancelDisk(instance) => {
                pool.cancel_disk(*instance);
                self.moves.cancel(*instance);
            }
            R::GrowDisk(disk) => {
                self.is_off(disk.instance)?;
                pool.claim(disk.instance, self.host.id)?;
                pool.grow_disk(disk, &mut |p| progress.send(p), &Cancel::default())?;
            }
            R::RestoreDisk(instance) => {
                self.is_off(*instance)?;
                pool.claim(*instance, self.host.id)?;
                pool.restore_disk(*instance)?;
                pool.release(*instance, self.host.id)?;
            }
            R::DropOldDisk(instance) => pool.drop_old_disk(*instance)?,
            R::DeleteDisk(instance) => {
                self.moves.stop_arrival(*instance);
                pool.delete_disk(*instance)?;
            }
            R::MarkDisk(mark) => {
                self.is_off(mark.instance)?;
                let (used_bytes, base) = pool.mark_disk(mark)?;
                return Ok(AgentReply::DiskMarked { used_bytes, base });
            }
            R::AwaitDisk(arrival) => {
                self.reservation(arrival.instance)?;
                self.is_off(arrival.instance)?;
                return self.moves.await_disk(&self.host, arrival);
            }
            R::SendDisk(departure) => {
                self.is_off(departure.instance)?;
                self.moves.send_disk(&self.host, departure, &mut |p| progress.send(p))?;
            }
            R::LeaveDisk(instance) => {
                self.is_off(*instance)?;
                match pool.leave_disk(*instance, self.host.id).map_err(RequestError::from) {
                    // Another host writes to the disk there, or somebody has put something beside it.
                    Err(error) if error.kind == ErrorKind::Conflict => {
                        tracing::error!(%instance, %error, "what it has left is left alone");
                    }
                    left => left?,
                }
            }
            R::FindImage(image) => {
                return Ok(AgentReply::Image { used_bytes: pool.find_image(*image)? });
            }
            R::AwaitImage(arrival) => return self.moves.await_image(&self.host, arrival),
            R::SendImage(departure) => {
                self.moves.send_image(&self.host, departure, &mut |p| progress.send(p))?;
            }
            R::SettleImage(arrival) => {
                pool.settle_image(arrival, &mut |p| progress.send(p), &Cancel::default())?;
            }
            R::DropImage { image, whole } => {
                self.moves.stop_image(*image);
                return Ok(AgentReply::Image { used_bytes: pool.drop_image(*image, *whole)? });
            }
            R::EnsureNetwork(wanted) => self.ensure_network(wanted)?,
            R::RemoveNetwork { network, vni, generation } => {
                if self.state.accept_network(*network, *generation, true).map_err(not_kept)? {
                    self.host.keeper.remove(*vni)?;
                }
            }
            R::DefineInstance(spec) => self.define(spec)?,
            R::StartInstance(instance) => {
                self.reservation(*instance)?;
                pool.ensure()?;
                pool.claim(*instance, self.host.id)?;
                self.host.keeper.open_taps(&self.hypervisor.taps(*instance)?)?;
                self.hypervisor.start(*instance)?;
                self.look_at(*instance)?;
            }
            R::StopInstance { instance, grace_ms } => {
                self.hypervisor.stop(*instance, Duration::from_millis(*grace_ms))?;
            }
            R::RebootInstance { instance, hard } => {
                self.host.keeper.open_taps(&self.hypervisor.taps(*instance)?)?;
                self.hypervisor.reboot(*instance, *hard)?;
                self.look_at(*instance)?;
            }
            R::PauseInstance { instance, paused } => self.hypervisor.pause(*instance, *paused)?,
            R::RemoveInstance(instance) => {
                self.hypervisor.remove(*instance)?;
                pool.release(*instance, self.host.id)?;
            }
            R::Console { instance, lines } => {
                return Ok(AgentReply::Console(pool.console(*instance, *lines)?));
            }
            R::PrepareMigration(target) => {
                self.holds(&target.spec)?;
                pool.ensure()?;
                let taps = target.spec.ports.iter().map(|port| tap_name(port.port)).collect();
                self.host.keeper.open_taps(&taps)?;
                let context = self.context(target.spec.instance)?;
                let ready = self.migrations.prepare(target, &context)?;
                return Ok(AgentReply::TargetReady(Box::new(ready)));
            }
            R::Migrate(source) => {
                let outcome = self.migrations.migrate(source, &mut |p| progress.send(p))?;
                self.hand_over(source);
                return Ok(AgentReply::Migrated(outcome));
            }
            R::CancelMigration(migration) => self.migrations.cancel(*migration)?,
            R::DiscardMigration { migration, instance } => {
                self.migrations.discard(*migration, *instance)?;
            }
            R::InstanceState(instance) => {
                return Ok(AgentReply::State(self.hypervisor.state(*instance)?));
            }
            R::TakeCertificate(certificate) => self.identity.take(certificate)?,
        }
        Ok(AgentReply::Done)
    }

    /// Holds what a plan says, unless the host is not the one that the plan was made for.
    fn reserve(&self, plan: &ReservePlan) -> Result<(), RequestError> {
        let reservations = &self.host.reservations;
        let instance = plan.reservation.instance;
        let held = if plan.beside { reservations.beside(instance) } else { reservations.get(instance) };
        if held.as_ref() == Some(&plan.reservation) {
            return Ok(());
        }
        let capacity = self.host.capacity()?;
        let planned = plan.generation;
        match self.reporter.told_cells(&capacity.cells) {
            Told::Since(changed) if planned < changed => {
                return Err(ReserveError::Stale { planned, changed: Some(changed) }.into());
            }
            Told::Otherwise => return Err(ReserveError::Stale { planned, changed: None }.into()),
            // An agent that has told nothing yet has nothing to hold the plan against but the host itself.
            Told::Since(_) | Told::Never => {}
        }
        match plan.beside {
            true => reservations.reserve_beside(&capacity, plan.reservation.clone())?,
            false => reservations.reserve(&capacity, plan.reservation.clone())?,
        };
        Ok(())
    }

    /// Whether what was started is where it was reserved: a guest that runs elsewhere is told of and goes on.
    fn look_at(&self, instance: InstanceId) -> Result<(), RequestError> {
        self.host.drifts.check(instance, &self.host.capacity()?.cells, true);
        Ok(())
    }

    fn report(&self) -> Answer {
        let report = tokio::runtime::Handle::current().block_on(self.reporter.next(true))?;
        let report = report.ok_or_else(|| RequestError::new(ErrorKind::Internal, "there is no report"))?;
        Ok(AgentReply::Report(Box::new(report)))
    }

    fn ensure_network(&self, wanted: &NetworkWanted) -> Result<(), RequestError> {
        // An older state than one that was wanted before: what is wanted is there, or on its way.
        if self.state.accept_network(wanted.network, wanted.generation, false).map_err(not_kept)? {
            self.host.keeper.ensure(wanted)?;
        }
        Ok(())
    }

    fn define(&self, spec: &InstanceSpec) -> Result<(), RequestError> {
        self.holds(spec)?;
        self.host.pool.write_config_drive(spec)?;
        Ok(self.hypervisor.define(spec, &self.context(spec.instance)?)?)
    }

    /// The disk follows the instance. When that fails the lease stays here, and is given back when the instance is
    /// removed here, which is the migration's next step.
    fn hand_over(&self, source: &MigrationSource) {
        let target = source.target.server_name.split('.').next().and_then(|host| host.parse::<HostId>().ok());
        let Some(target) = target else { return };
        if let Err(error) = self.host.pool.hand_over(source.instance, self.host.id, target) {
            tracing::warn!(instance = %source.instance, "the disk's lease stays here: {}", chain(&error));
        }
    }

    /// What an instance holds here. Nothing is started that holds nothing.
    fn reservation(&self, instance: InstanceId) -> Result<Reservation, RequestError> {
        self.host.reservations.get(instance).ok_or_else(|| {
            RequestError::new(
                ErrorKind::Conflict,
                format!("instance {instance} holds no reservation on this host; reserve first"),
            )
        })
    }

    /// Nobody but us may touch the disk of a guest that runs.
    fn is_off(&self, instance: InstanceId) -> Result<(), RequestError> {
        match self.hypervisor.state(instance)? {
            None | Some(InstanceState::Stopped | InstanceState::Crashed) => Ok(()),
            Some(_) => {
                let text = format!("instance {instance} is on; its disk is left alone");
                Err(RequestError::new(ErrorKind::Conflict, text))
            }
        }
    }

    fn holds(&self, spec: &InstanceSpec) -> Result<(), RequestError> {
        if self.reservation(spec.instance)? == spec.reservation {
            return Ok(());
        }
        let text = format!("instance {} holds another reservation on this host than it says", spec.instance);
        Err(RequestError::new(ErrorKind::Conflict, text))
    }

    fn context(&self, instance: InstanceId) -> Result<DomainContext, RequestError> {
        let pool = &self.host.pool;
        Ok(DomainContext {
            pool: self.host.config.pool.clone(),
            base: pool.base(instance)?,
            stop_on_error: pool.stops_guests(),
            cells: self.host.capacity()?.cells,
            memory_binding: self.host.config.memory_binding,
        })
    }
}

fn not_kept(error: crate::state::StateError) -> RequestError {
    RequestError::new(ErrorKind::Unavailable, godwit_protocol::error::chain(&error))
}

#[cfg(test)]
mod tests;
