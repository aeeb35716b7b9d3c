//! AdapterService: PEFT folders in and out, versions, the swap.

use std::sync::Arc;
use std::time::Duration;

use tonic::{Request, Response, Streaming};

use super::auth::caller_of;
use super::paced::{export_chunk, next_chunk, paced};
use super::peft_upload::PeftUpload;
use super::proto::adapter_service_server::AdapterService;
use super::proto::{export_adapter_response as exported, import_adapter_request as imported};
use super::shared::Shared;
use super::uploads::misplaced_header;
use super::{Answer, Streamed, convert, proto as pb};
use crate::error::Error;
use crate::hub::{CONFIG_FILE, NewVersion, Package, TENSORS_FILE};
use crate::ids::{AdapterName, AdapterRef, TenantId, VersionName};
use crate::store::{AdapterRow, VersionRow};
use crate::work::run_holding;

pub struct Adapters(pub Arc<Shared>);

impl Adapters {
    /// A row, and where its live version is.
    fn adapter(&self, row: AdapterRow) -> pb::Adapter {
        let live = row.live_memory.as_ref().map(|live| self.0.parts.hub.residency(&live.uid, live.memory_bytes));
        convert::adapter_message(row, live)
    }

    /// A row, and where the version is.
    fn version(&self, row: VersionRow) -> pb::AdapterVersion {
        let residency = self.0.parts.hub.residency(&row.uid, row.memory_bytes);
        convert::version(row, residency)
    }
}

#[tonic::async_trait]
impl AdapterService for Adapters {
    type ExportAdapterStream = Streamed<pb::ExportAdapterResponse>;

    async fn import_adapter(
        &self,
        request: Request<Streaming<pb::ImportAdapterRequest>>,
    ) -> Answer<pb::AdapterVersion> {
        let (_, call, messages) = request.into_parts();
        let mut upload = self.0.uploads.open(&call, messages)?;
        let Some(imported::Part::Header(header)) = upload.next().await?.and_then(|message| message.part) else {
            return Err(misplaced_header().into());
        };
        let parent: TenantId = convert::name("header.parent", &header.parent)?;
        let tenant = self.0.auth.tenant_for(&call, &parent).await?;
        let mut folder = PeftUpload::new(&self.0.parts);
        let adapter = AdapterName::new(&parent, &header.adapter_id).map_err(|e| convert::at("header.adapter_id", e))?;
        while let Some(message) = upload.next().await? {
            match message.part {
                Some(imported::Part::Chunk(chunk)) => folder.add(&chunk).await?,
                _ => return Err(misplaced_header().into()),
            }
        }
        let files = folder.finish()?;
        let bulk = self.0.parts.memory.bulk(files.memory_bytes()).await?;
        let mut new = NewVersion {
            adapter,
            package: Package::default(),
            probes: Vec::new(),
            publish: convert::publish(header.publish).map_err(|e| convert::at("header.publish", e))?,
            job: None,
            metrics: Default::default(),
            request_id: convert::request_id(header.request_id).map_err(|e| convert::at("header.request_id", e))?,
            validate_only: header.validate_only,
            held_reason: None,
            note: None,
        };
        let hub = self.0.parts.hub.clone();
        let (row, _) = run_holding((upload.into_place(), bulk), async move {
            new.package = files.read().await?;
            hub.publish(&tenant, new).await
        })
        .await?;
        Ok(Response::new(self.version(row)))
    }

    async fn export_adapter(&self, request: Request<pb::ExportAdapterRequest>) -> Answer<Self::ExportAdapterStream> {
        let name: AdapterRef = convert::name("name", &request.get_ref().name)?;
        let tenant = self.0.auth.tenant_for(request.extensions(), name.tenant()).await?;
        let place = self.0.reads.take(caller_of(request.extensions())?)?;
        let row = self.0.parts.store.resolve(&name).await?;
        let bulk = self.0.parts.memory.bulk(row.size_bytes).await?;
        let hub = self.0.parts.hub.clone();
        let ((row, files), (place, bulk)) =
            run_holding((place, bulk), async move { hub.export(&tenant, &name).await }).await?;
        drop(bulk);
        let size = export_chunk(&self.0.parts.limits);
        let version = self.version(row);
        let parts = async_stream::try_stream! {
            let _place = place;
            yield part(exported::Part::Version(version));
            for data in files.config.chunks(size as usize) {
                yield chunk(CONFIG_FILE, data.to_vec());
            }
            let mut tensors = tokio::fs::File::from_std(files.tensors);
            while let Some(data) = next_chunk(&mut tensors, TENSORS_FILE, size).await? {
                yield chunk(TENSORS_FILE, data);
            }
        };
        let idle = Duration::from_secs(self.0.parts.limits.export_idle_seconds);
        Ok(Response::new(paced(parts, idle)))
    }

    async fn get_adapter(&self, request: Request<pb::GetAdapterRequest>) -> Answer<pb::Adapter> {
        let name: AdapterName = convert::name("name", &request.get_ref().name)?;
        self.0.auth.tenant_for(request.extensions(), &name.tenant).await?;
        let row = self.0.parts.store.get_adapter(&name).await?;
        Ok(Response::new(self.adapter(row)))
    }

    async fn list_adapters(&self, request: Request<pb::ListAdaptersRequest>) -> Answer<pb::ListAdaptersResponse> {
        let (_, call, request) = request.into_parts();
        let parent: TenantId = convert::name("parent", &request.parent)?;
        self.0.auth.tenant_for(&call, &parent).await?;
        let list = convert::List::of("adapters", &parent);
        let page = list.page(request.page_size, request.page_token)?;
        let listed = self.0.parts.store.list_adapters(&parent, &page).await?;
        let adapters = listed.items.into_iter().map(|row| self.adapter(row)).collect();
        Ok(Response::new(pb::ListAdaptersResponse { adapters, next_page_token: list.token(&listed.next) }))
    }

    async fn list_adapter_versions(
        &self,
        request: Request<pb::ListAdapterVersionsRequest>,
    ) -> Answer<pb::ListAdapterVersionsResponse> {
        let (_, call, request) = request.into_parts();
        let parent: AdapterName = convert::name("parent", &request.parent)?;
        self.0.auth.tenant_for(&call, &parent.tenant).await?;
        let list = convert::List::of("versions", &parent);
        let page = list.page(request.page_size, request.page_token)?;
        let listed = self.0.parts.store.list_versions(&parent, &page).await?;
        let versions = listed.items.into_iter().map(|row| self.version(row)).collect();
        Ok(Response::new(pb::ListAdapterVersionsResponse { versions, next_page_token: list.token(&listed.next) }))
    }

    async fn set_live_version(&self, request: Request<pb::SetLiveVersionRequest>) -> Answer<pb::Adapter> {
        let (_, call, request) = request.into_parts();
        let name: AdapterName = convert::name("name", &request.name)?;
        let tenant = self.0.auth.tenant_for(&call, &name.tenant).await?;
        let version: VersionName = convert::name("version", &request.version)?;
        tenant.check_owns(version.tenant())?;
        if version.adapter != name {
            return Err(Error::invalid("version", format!("must be a version of {name}")).into());
        }
        let row = self.0.parts.hub.set_live(&tenant, &version, &request.etag).await?;
        Ok(Response::new(self.adapter(row)))
    }

    async fn delete_adapter(&self, request: Request<pb::DeleteAdapterRequest>) -> Answer<pb::DeleteAdapterResponse> {
        let (_, call, request) = request.into_parts();
        let name: AdapterName = convert::name("name", &request.name)?;
        let tenant = self.0.auth.tenant_for(&call, &name.tenant).await?;
        self.0.parts.hub.delete_adapter(&tenant, &name, &request.etag).await?;
        Ok(Response::new(pb::DeleteAdapterResponse {}))
    }
}

fn part(part: exported::Part) -> pb::ExportAdapterResponse {
    pb::ExportAdapterResponse { part: Some(part) }
}

fn chunk(filename: &str, data: Vec<u8>) -> pb::ExportAdapterResponse {
    part(exported::Part::Chunk(pb::FileChunk { filename: filename.to_owned(), data }))
}
