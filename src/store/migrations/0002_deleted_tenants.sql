-- Ids of tenants that are gone. None is given again: an old name, key or upload under way must never mean another tenant.

CREATE TABLE deleted_tenants (
    tenant      TEXT PRIMARY KEY,
    delete_time INTEGER NOT NULL
) STRICT;
