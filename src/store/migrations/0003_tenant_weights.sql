-- A tenant's share of the engine beside others', and what an update of the tenant is checked against. The empty etag of tenants made
-- before is one like any other.

ALTER TABLE tenants ADD COLUMN weight INTEGER NOT NULL DEFAULT 1;
ALTER TABLE tenants ADD COLUMN etag TEXT NOT NULL DEFAULT '';
