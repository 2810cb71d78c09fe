//! Model pools beside the coordinator's, and what is in them of images.

use godwit_protocol::disk::DiskAwaited;
use godwit_protocol::error::{ErrorKind, RequestError};
use godwit_protocol::id::{HostId, ImageId};
use godwit_protocol::request::{AgentReply, AgentRequest};
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use uuid::Uuid;

/// Which host has which pool. A host that is not named has the coordinator's, with every image.
#[derive(Debug, Default)]
pub(crate) struct ImagePools {
    /// Pools by their marks.
    pub(crate) of: BTreeMap<HostId, Uuid>,
    /// What is there.
    pub(crate) images: BTreeSet<(Uuid, ImageId)>,
    /// What has come and is not proved.
    pub(crate) incoming: BTreeSet<(Uuid, ImageId)>,
    /// What is sent is not what was uploaded.
    pub(crate) damaged: bool,
    /// Who was asked first to remove an image, and does not answer; none: the next who is asked.
    pub(crate) hanging: Option<Option<HostId>>,
    awaited: BTreeSet<(HostId, ImageId)>,
}

impl ImagePools {
    fn has(&self, host: HostId, image: ImageId) -> bool {
        self.of.get(&host).is_none_or(|pool| self.images.contains(&(*pool, image)))
    }

    /// Whether the host does not answer to this.
    pub(crate) fn hangs(&mut self, host: HostId, request: &AgentRequest) -> bool {
        match (request, &mut self.hanging) {
            (AgentRequest::DropImage { .. }, Some(hanging)) => *hanging.get_or_insert(host) == host,
            _ => false,
        }
    }

    fn found(&self, host: HostId, image: ImageId) -> Option<Result<AgentReply, RequestError>> {
        Some(Ok(AgentReply::Image { used_bytes: self.has(host, image).then_some(1) }))
    }

    /// What is about images; none for all else.
    pub(crate) fn act(
        &mut self,
        host: HostId,
        address: SocketAddr,
        request: &AgentRequest,
    ) -> Option<Result<AgentReply, RequestError>> {
        let error = |kind, text: &str| Some(Err(RequestError::new(kind, text)));
        match request {
            AgentRequest::CreateDisk(disk) if !self.has(host, disk.image.image) => {
                error(ErrorKind::NotFound, "the image is not there")
            }
            AgentRequest::FindImage(image) => self.found(host, *image),
            AgentRequest::AwaitImage(arrival) if self.has(host, arrival.image) => {
                Some(Ok(AgentReply::DiskHere))
            }
            AgentRequest::AwaitImage(arrival) => {
                self.awaited.insert((host, arrival.image));
                let awaited = DiskAwaited { address, target: host, token: "token".into() };
                Some(Ok(AgentReply::DiskAwaited(awaited)))
            }
            AgentRequest::SendImage(departure) => {
                let (image, target) = (departure.image, departure.awaited.target);
                if !self.has(host, image) {
                    return error(ErrorKind::NotFound, "no such image");
                }
                if !self.awaited.remove(&(target, image)) {
                    return error(ErrorKind::Unavailable, "nobody waits for it");
                }
                self.incoming.extend(self.of.get(&target).map(|pool| (*pool, image)));
                Some(Ok(AgentReply::Done))
            }
            AgentRequest::SettleImage(_) if self.damaged => {
                error(ErrorKind::Damaged, "it is not the image that was uploaded")
            }
            AgentRequest::SettleImage(arrival) => {
                if self.has(host, arrival.image) {
                    return Some(Ok(AgentReply::Done));
                }
                let arrived = self.of.get(&host).map(|pool| (*pool, arrival.image));
                match arrived.filter(|arrived| self.incoming.remove(arrived)) {
                    Some(arrived) => drop(self.images.insert(arrived)),
                    None => return error(ErrorKind::Unavailable, "it has not come yet"),
                }
                Some(Ok(AgentReply::Done))
            }
            AgentRequest::DropImage { image, whole } => {
                self.awaited.remove(&(host, *image));
                if let Some(pool) = self.of.get(&host) {
                    self.incoming.remove(&(*pool, *image));
                    if *whole {
                        self.images.remove(&(*pool, *image));
                    }
                }
                self.found(host, *image)
            }
            _ => None,
        }
    }
}
