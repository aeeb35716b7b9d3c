//! DatasetService: training data in, its list, its report.

use std::sync::Arc;

use tonic::{Request, Response, Status, Streaming};

use super::auth::caller_of;
use super::proto::dataset_service_server::DatasetService;
use super::proto::{upload_dataset_request as records, upload_preferences_request as preferences};
use super::shared::Shared;
use super::uploads::misplaced_header;
use super::{Answer, convert, proto as pb};
use crate::data::{self, Question, Upload};
use crate::error::Error;
use crate::ids::{DatasetName, TenantId};
use crate::store::DatasetKind;
use crate::work::run_holding;

pub struct Datasets(pub Arc<Shared>);

impl Datasets {
    async fn begin(
        &self,
        call: &tonic::Extensions,
        header: pb::UploadHeader,
        kind: DatasetKind,
    ) -> Result<Upload, Status> {
        let parent: TenantId = convert::name("header.parent", &header.parent)?;
        let tenant = self.0.auth.tenant_for(call, &parent).await?;
        let name = DatasetName::new(&parent, &header.dataset_id).map_err(|e| convert::at("header.dataset_id", e))?;
        let request_id = convert::request_id(header.request_id).map_err(|e| convert::at("header.request_id", e))?;
        let parts = &self.0.parts;
        let (store, text, limits) = (&parts.store, &parts.text, &parts.limits);
        Ok(Upload::begin(store, text, limits, &tenant, name, kind, &request_id, header.validate_only).await?)
    }
}

impl Datasets {
    /// What an inspection is to look for; records are measured as training would.
    fn question(&self, request: &pb::InspectDatasetRequest) -> crate::error::Result<Question> {
        let limits = &self.0.parts.limits;
        let longest = limits.max_record_tokens.min(self.0.parts.context_length as u64);
        let max_length = match u64::from(request.max_length) {
            0 => longest,
            length if (2..=longest).contains(&length) => length,
            _ => {
                let message = format!("must be in 2..={longest} (limit max_record_tokens, and the base's context)");
                return Err(Error::invalid("max_length", message));
            }
        };
        if u64::from(request.show) > limits.max_shown_records {
            let message = format!("must be at most {} (limit max_shown_records)", limits.max_shown_records);
            return Err(Error::invalid("show", message));
        }
        Ok(Question { max_length: usize::try_from(max_length).unwrap_or(usize::MAX), show: request.show as usize })
    }
}

#[tonic::async_trait]
impl DatasetService for Datasets {
    async fn upload_dataset(&self, request: Request<Streaming<pb::UploadDatasetRequest>>) -> Answer<pb::Dataset> {
        let (_, call, messages) = request.into_parts();
        let mut incoming = self.0.uploads.open(&call, messages)?;
        let Some(records::Part::Header(header)) = incoming.next().await?.and_then(|message| message.part) else {
            return Err(misplaced_header().into());
        };
        let mut upload = self.begin(&call, header, DatasetKind::Sft).await?;
        while let Some(message) = incoming.next().await? {
            match message.part {
                Some(records::Part::Data(data)) => upload.write(data).await?,
                _ => return Err(misplaced_header().into()),
            }
        }
        Ok(Response::new(convert::uploaded(upload.finish().await?)))
    }

    async fn upload_preferences(
        &self,
        request: Request<Streaming<pb::UploadPreferencesRequest>>,
    ) -> Answer<pb::Dataset> {
        let (_, call, messages) = request.into_parts();
        let mut incoming = self.0.uploads.open(&call, messages)?;
        let Some(preferences::Part::Header(header)) = incoming.next().await?.and_then(|message| message.part) else {
            return Err(misplaced_header().into());
        };
        let mut upload = self.begin(&call, header, DatasetKind::Preferences).await?;
        let mut form = convert::UploadEncoding::default();
        while let Some(message) = incoming.next().await? {
            match message.part {
                Some(preferences::Part::Pair(pair)) => upload.write_record(&form.record(pair)?).await?,
                Some(preferences::Part::Data(data)) => upload.write(form.data(data)?).await?,
                _ => return Err(misplaced_header().into()),
            }
        }
        Ok(Response::new(convert::uploaded(upload.finish().await?)))
    }

    async fn get_dataset(&self, request: Request<pb::GetDatasetRequest>) -> Answer<pb::Dataset> {
        let name: DatasetName = convert::name("name", &request.get_ref().name)?;
        self.0.auth.tenant_for(request.extensions(), &name.tenant).await?;
        let row = self.0.parts.store.get_dataset(&name).await?;
        Ok(Response::new(convert::dataset(row)))
    }

    async fn list_datasets(&self, request: Request<pb::ListDatasetsRequest>) -> Answer<pb::ListDatasetsResponse> {
        let (_, call, request) = request.into_parts();
        let parent: TenantId = convert::name("parent", &request.parent)?;
        self.0.auth.tenant_for(&call, &parent).await?;
        let list = convert::List::of("datasets", &parent);
        let page = list.page(request.page_size, request.page_token)?;
        let listed = self.0.parts.store.list_datasets(&parent, &page).await?;
        let datasets = listed.items.into_iter().map(convert::dataset).collect();
        Ok(Response::new(pb::ListDatasetsResponse { datasets, next_page_token: list.token(&listed.next) }))
    }

    async fn inspect_dataset(&self, request: Request<pb::InspectDatasetRequest>) -> Answer<pb::DatasetReport> {
        let name: DatasetName = convert::name("name", &request.get_ref().name)?;
        let tenant = self.0.auth.tenant_for(request.extensions(), &name.tenant).await?;
        let question = self.question(request.get_ref())?;
        let place = self.0.reads.take(caller_of(request.extensions())?)?;
        let parts = self.0.parts.clone();
        let bulk = self.0.bulk_of_dataset(&name).await?;
        let inspect = async move { data::inspect(&parts.store, &parts.text, &tenant, &name, question).await };
        let (report, _) = run_holding((place, bulk), inspect).await?;
        Ok(Response::new(convert::report(report)))
    }

    async fn delete_dataset(&self, request: Request<pb::DeleteDatasetRequest>) -> Answer<pb::DeleteDatasetResponse> {
        let name: DatasetName = convert::name("name", &request.get_ref().name)?;
        let tenant = self.0.auth.tenant_for(request.extensions(), &name.tenant).await?;
        data::delete_dataset(&self.0.parts.store, &tenant, &name).await?;
        Ok(Response::new(pb::DeleteDatasetResponse {}))
    }
}
