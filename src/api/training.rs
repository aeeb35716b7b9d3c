//! TrainingService: jobs and their events.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use tonic::{Request, Response};

use super::auth::caller_of;
use super::edge::draining;
use super::paced::{export_chunk, next_chunk, paced};
use super::proto::export_trained_model_response as exported;
use super::proto::train_request::Start;
use super::proto::training_service_server::TrainingService;
use super::shared::Shared;
use super::{Answer, Streamed, convert, proto as pb};
use crate::error::Result;
use crate::ids::{AdapterName, AdapterRef, DatasetName, JobName, Tenant, TenantId, VersionName};
use crate::train::ModelFile;
use crate::train::fit::CancelToken;
use crate::work::run_holding;

pub struct Training(pub Arc<Shared>);

impl Training {
    /// The version that a job starts from: an adapter's name means its live one now.
    async fn start_version(&self, tenant: &Tenant, request: &pb::TrainRequest) -> Result<Option<VersionName>> {
        let Some(Start::FromVersion(name)) = &request.start else { return Ok(None) };
        let from: AdapterRef = convert::name("from_version", name)?;
        tenant.check_owns(from.tenant())?;
        Ok(Some(self.0.parts.store.resolve(&from).await?.name))
    }
}

#[tonic::async_trait]
impl TrainingService for Training {
    type WatchTrainingJobStream = Streamed<pb::TrainingEvent>;
    type ExportTrainedModelStream = Streamed<pb::ExportTrainedModelResponse>;

    async fn train(&self, request: Request<pb::TrainRequest>) -> Answer<pb::TrainingJob> {
        let (_, call, request) = request.into_parts();
        let parent: TenantId = convert::name("parent", &request.parent)?;
        let tenant = self.0.auth.tenant_for(&call, &parent).await?;
        tenant.check_owns(&convert::name::<DatasetName>("dataset", &request.dataset)?.tenant)?;
        let key = convert::train_key(&request)?;
        // Before the names are looked up: a retry means what they meant at first.
        let adapter = AdapterName::new(&parent, &request.adapter_id)?;
        if let Some(made) = self.0.parts.store.job_of_request(&adapter, &key).await? {
            return Ok(Response::new(convert::job(made)));
        }
        let from = self.start_version(&tenant, &request).await?;
        let spec = convert::job_spec(&request, from)?;
        if request.validate_only {
            // It reads the whole dataset.
            let place = self.0.reads.take(caller_of(&call)?)?;
            let (trainer, control) = (self.0.parts.trainer.clone(), Arc::new(CancelToken::default()));
            // The work goes on where its caller goes away, to give its place back at its end; this makes the end come soon.
            let _stop = control.stop_on_drop();
            let validate = async move {
                let validated = trainer.validate(&tenant, &spec, control).await?;
                Ok((spec, validated))
            };
            let ((spec, validated), _) = run_holding(place, validate).await?;
            return Ok(Response::new(convert::validated(&spec, validated)));
        }
        let row = self.0.parts.trainer.submit(&tenant, spec, &key).await?;
        Ok(Response::new(convert::job(row)))
    }

    async fn get_training_job(&self, request: Request<pb::GetTrainingJobRequest>) -> Answer<pb::TrainingJob> {
        let name: JobName = convert::name("name", &request.get_ref().name)?;
        self.0.auth.tenant_for(request.extensions(), &name.tenant).await?;
        let row = self.0.parts.store.get_job(&name).await?;
        Ok(Response::new(convert::job(row)))
    }

    async fn list_training_jobs(
        &self,
        request: Request<pb::ListTrainingJobsRequest>,
    ) -> Answer<pb::ListTrainingJobsResponse> {
        let (_, call, request) = request.into_parts();
        let parent: TenantId = convert::name("parent", &request.parent)?;
        self.0.auth.tenant_for(&call, &parent).await?;
        let list = convert::List::of("trainingJobs", &parent);
        let page = list.page(request.page_size, request.page_token)?;
        let listed = self.0.parts.store.list_jobs(&parent, &page).await?;
        let training_jobs = listed.items.into_iter().map(convert::job).collect();
        Ok(Response::new(pb::ListTrainingJobsResponse { training_jobs, next_page_token: list.token(&listed.next) }))
    }

    async fn watch_training_job(
        &self,
        request: Request<pb::WatchTrainingJobRequest>,
    ) -> Answer<Self::WatchTrainingJobStream> {
        let name: JobName = convert::name("name", &request.get_ref().name)?;
        let tenant = self.0.auth.tenant_for(request.extensions(), &name.tenant).await?;
        let mut events = self.0.parts.trainer.watch(&tenant, &name, request.get_ref().after_sequence).await?;
        let calls = self.0.calls.clone();
        let answer = async_stream::try_stream! {
            loop {
                let next = tokio::select! {
                    event = events.next() => event,
                    () = calls.closing() => Some(Err(draining())),
                };
                match next {
                    Some(event) => yield convert::event(event?),
                    None => break,
                }
            }
        };
        Ok(Response::new(Box::pin(answer)))
    }

    async fn cancel_training_job(&self, request: Request<pb::CancelTrainingJobRequest>) -> Answer<pb::TrainingJob> {
        let name: JobName = convert::name("name", &request.get_ref().name)?;
        let tenant = self.0.auth.tenant_for(request.extensions(), &name.tenant).await?;
        Ok(Response::new(convert::job(self.0.parts.trainer.cancel(&tenant, &name).await?)))
    }

    async fn resume_training_job(&self, request: Request<pb::ResumeTrainingJobRequest>) -> Answer<pb::TrainingJob> {
        let name: JobName = convert::name("name", &request.get_ref().name)?;
        let tenant = self.0.auth.tenant_for(request.extensions(), &name.tenant).await?;
        Ok(Response::new(convert::job(self.0.parts.trainer.resume(&tenant, &name).await?)))
    }

    async fn export_trained_model(
        &self,
        request: Request<pb::ExportTrainedModelRequest>,
    ) -> Answer<Self::ExportTrainedModelStream> {
        let name: JobName = convert::name("name", &request.get_ref().name)?;
        let tenant = self.0.auth.tenant_for(request.extensions(), &name.tenant).await?;
        let place = self.0.reads.take(caller_of(request.extensions())?)?;
        let format = convert::model_format(request.get_ref().format)?;
        let (row, files) = self.0.parts.trainer.model_files(&tenant, &name, format).await?;
        let size = export_chunk(&self.0.parts.limits);
        let part = |part| pb::ExportTrainedModelResponse { part: Some(part) };
        let parts = async_stream::try_stream! {
            let _place = place;
            yield part(exported::Part::Job(convert::job(row)));
            for ModelFile { name, file } in files {
                let mut file = tokio::fs::File::from_std(file);
                while let Some(data) = next_chunk(&mut file, &name, size).await? {
                    yield part(exported::Part::Chunk(pb::FileChunk { filename: name.clone(), data }));
                }
            }
        };
        let idle = Duration::from_secs(self.0.parts.limits.export_idle_seconds);
        Ok(Response::new(paced(parts, idle)))
    }

    async fn delete_training_job(
        &self,
        request: Request<pb::DeleteTrainingJobRequest>,
    ) -> Answer<pb::DeleteTrainingJobResponse> {
        let name: JobName = convert::name("name", &request.get_ref().name)?;
        let tenant = self.0.auth.tenant_for(request.extensions(), &name.tenant).await?;
        self.0.parts.trainer.delete(&tenant, &name).await?;
        Ok(Response::new(pb::DeleteTrainingJobResponse {}))
    }
}
