"""The tables that reembed meets in an ai-memory database of schema version 57.

Columns, indexes and triggers are those of a database that ai-memory 0.7.0 made; the tables
that no part of reembed looks at are left out.
"""

SCHEMA = """
CREATE TABLE memories (
    id TEXT PRIMARY KEY,
    tier TEXT NOT NULL,
    namespace TEXT NOT NULL DEFAULT 'global',
    title TEXT NOT NULL,
    content TEXT NOT NULL,
    tags TEXT NOT NULL DEFAULT '[]',
    priority INTEGER NOT NULL DEFAULT 5,
    confidence REAL NOT NULL DEFAULT 1.0,
    source TEXT NOT NULL DEFAULT 'api',
    access_count INTEGER NOT NULL DEFAULT 0,
    created_at TEXT NOT NULL,
    updated_at TEXT NOT NULL,
    last_accessed_at TEXT,
    expires_at TEXT,
    metadata TEXT NOT NULL DEFAULT '{}',
    reflection_depth INTEGER NOT NULL DEFAULT 0,
    memory_kind TEXT NOT NULL DEFAULT 'observation',
    atomised_into INTEGER,
    atom_of TEXT REFERENCES memories (id),
    entity_id TEXT,
    persona_version INTEGER,
    citations TEXT NOT NULL DEFAULT '[]',
    source_uri TEXT,
    source_span TEXT,
    confidence_source TEXT NOT NULL DEFAULT 'caller_provided',
    confidence_signals TEXT,
    confidence_decayed_at TEXT,
    mentioned_entity_id TEXT,
    encrypted_envelope BLOB,
    version BIGINT NOT NULL DEFAULT 1,
    embedding BLOB,
    scope_idx TEXT GENERATED ALWAYS AS (CASE WHEN json_valid(metadata)
        THEN COALESCE(json_extract(metadata, '$.scope'), 'private') ELSE 'private' END) VIRTUAL,
    agent_id_idx TEXT GENERATED ALWAYS AS (CASE WHEN json_valid(metadata)
        THEN json_extract(metadata, '$.agent_id') ELSE NULL END) VIRTUAL,
    embedding_dim INTEGER
);
CREATE INDEX idx_memories_tier ON memories (tier);
CREATE INDEX idx_memories_namespace ON memories (namespace);
CREATE INDEX idx_memories_priority ON memories (priority DESC);
CREATE INDEX idx_memories_expires ON memories (expires_at);
CREATE INDEX idx_memories_updated_at ON memories (updated_at);
CREATE INDEX idx_memories_list_order ON memories (priority DESC, updated_at DESC);
CREATE INDEX idx_memories_ns_list_order ON memories (namespace, priority DESC, updated_at DESC);
CREATE UNIQUE INDEX idx_memories_title_ns ON memories (title, namespace);
CREATE INDEX idx_memories_scope_idx ON memories (scope_idx);
CREATE INDEX idx_memories_agent_id ON memories (agent_id_idx);
CREATE INDEX idx_memories_created_at ON memories (created_at);
CREATE INDEX idx_memories_embedding_dim ON memories (embedding_dim)
    WHERE embedding_dim IS NOT NULL;
CREATE INDEX idx_memories_ns_dim ON memories (namespace, embedding_dim)
    WHERE embedding_dim IS NOT NULL;
CREATE INDEX idx_memories_memory_kind ON memories (memory_kind);
CREATE INDEX idx_memories_atom_of ON memories (atom_of) WHERE atom_of IS NOT NULL;
CREATE INDEX idx_memories_atomised_into ON memories (atomised_into) WHERE atomised_into > 0;
CREATE INDEX idx_personas_by_entity ON memories (entity_id, namespace)
    WHERE memory_kind = 'persona';
CREATE INDEX idx_memories_source_uri ON memories (source_uri) WHERE source_uri IS NOT NULL;
CREATE INDEX idx_memories_confidence_source ON memories (confidence_source)
    WHERE confidence_source != 'caller_provided';
CREATE INDEX idx_memories_mentioned_entity ON memories (mentioned_entity_id, namespace)
    WHERE memory_kind = 'reflection';

CREATE TRIGGER memories_ck_tier_ins BEFORE INSERT ON memories
    WHEN NEW.tier NOT IN ('short', 'mid', 'long')
    BEGIN SELECT RAISE(ABORT, 'tier is not short, mid or long'); END;
CREATE TRIGGER memories_ck_tier_upd BEFORE UPDATE OF tier ON memories
    WHEN NEW.tier NOT IN ('short', 'mid', 'long')
    BEGIN SELECT RAISE(ABORT, 'tier is not short, mid or long'); END;
CREATE TRIGGER memories_ck_priority_ins BEFORE INSERT ON memories
    WHEN NEW.priority < 1 OR NEW.priority > 10
    BEGIN SELECT RAISE(ABORT, 'priority is not within 1 to 10'); END;
CREATE TRIGGER memories_ck_priority_upd BEFORE UPDATE OF priority ON memories
    WHEN NEW.priority < 1 OR NEW.priority > 10
    BEGIN SELECT RAISE(ABORT, 'priority is not within 1 to 10'); END;
CREATE TRIGGER memories_ck_confidence_ins BEFORE INSERT ON memories
    WHEN NEW.confidence < 0.0 OR NEW.confidence > 1.0
    BEGIN SELECT RAISE(ABORT, 'confidence is not within 0 to 1'); END;
CREATE TRIGGER memories_ck_confidence_upd BEFORE UPDATE OF confidence ON memories
    WHEN NEW.confidence < 0.0 OR NEW.confidence > 1.0
    BEGIN SELECT RAISE(ABORT, 'confidence is not within 0 to 1'); END;

CREATE VIRTUAL TABLE memories_fts USING fts5(
    title, content, tags, content=memories, content_rowid=rowid
);
CREATE TRIGGER memories_ai AFTER INSERT ON memories BEGIN
    INSERT INTO memories_fts (rowid, title, content, tags)
        VALUES (NEW.rowid, NEW.title, NEW.content, NEW.tags);
END;
CREATE TRIGGER memories_ad AFTER DELETE ON memories BEGIN
    INSERT INTO memories_fts (memories_fts, rowid, title, content, tags)
        VALUES ('delete', OLD.rowid, OLD.title, OLD.content, OLD.tags);
END;
CREATE TRIGGER memories_au AFTER UPDATE OF title, content, tags ON memories BEGIN
    INSERT INTO memories_fts (memories_fts, rowid, title, content, tags)
        VALUES ('delete', OLD.rowid, OLD.title, OLD.content, OLD.tags);
    INSERT INTO memories_fts (rowid, title, content, tags)
        VALUES (NEW.rowid, NEW.title, NEW.content, NEW.tags);
END;

CREATE TABLE archived_memories (
    id TEXT PRIMARY KEY,
    tier TEXT NOT NULL,
    namespace TEXT NOT NULL DEFAULT 'global',
    title TEXT NOT NULL,
    content TEXT NOT NULL,
    tags TEXT NOT NULL DEFAULT '[]',
    priority INTEGER NOT NULL DEFAULT 5,
    confidence REAL NOT NULL DEFAULT 1.0,
    source TEXT NOT NULL DEFAULT 'api',
    access_count INTEGER NOT NULL DEFAULT 0,
    created_at TEXT NOT NULL,
    updated_at TEXT NOT NULL,
    last_accessed_at TEXT,
    expires_at TEXT,
    archived_at TEXT NOT NULL,
    archive_reason TEXT NOT NULL DEFAULT 'ttl_expired',
    metadata TEXT NOT NULL DEFAULT '{}',
    embedding BLOB,
    embedding_dim INTEGER,
    original_tier TEXT,
    original_expires_at TEXT,
    reflection_depth INTEGER,
    atomised_into INTEGER,
    atom_of TEXT,
    memory_kind TEXT,
    entity_id TEXT,
    persona_version INTEGER,
    citations TEXT,
    source_uri TEXT,
    source_span TEXT,
    confidence_source TEXT,
    confidence_signals TEXT,
    confidence_decayed_at TEXT,
    mentioned_entity_id TEXT,
    version INTEGER
);
CREATE INDEX idx_archived_namespace ON archived_memories (namespace);
CREATE INDEX idx_archived_at ON archived_memories (archived_at);
CREATE INDEX idx_archived_ns_archived_at ON archived_memories (namespace, archived_at DESC);

CREATE TABLE signed_events (
    id TEXT PRIMARY KEY,
    agent_id TEXT NOT NULL,
    event_type TEXT NOT NULL,
    payload_hash BLOB NOT NULL,
    signature BLOB,
    attest_level TEXT NOT NULL DEFAULT 'unsigned',
    timestamp TEXT NOT NULL,
    prev_hash BLOB,
    sequence INTEGER
);
CREATE INDEX idx_signed_events_agent ON signed_events (agent_id);
CREATE INDEX idx_signed_events_type ON signed_events (event_type);
CREATE INDEX idx_signed_events_timestamp ON signed_events (timestamp);
CREATE UNIQUE INDEX idx_signed_events_sequence ON signed_events (sequence);

CREATE TABLE namespace_meta (
    namespace TEXT PRIMARY KEY,
    standard_id TEXT,
    updated_at TEXT NOT NULL,
    parent_namespace TEXT
);
CREATE TABLE schema_version (version INTEGER NOT NULL);
INSERT INTO schema_version VALUES (57);
"""
