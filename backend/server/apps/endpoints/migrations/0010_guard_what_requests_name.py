from django.db import migrations

REQUESTS = 'endpoints_mlrequest'
# By column of the requests, what it names.
NAMED = {'parent_mlalgorithm_id': 'endpoints_mlalgorithm', 'abtest_id': 'endpoints_abtest'}

# The lock waits for the requests that are being recorded, so that they are seen. (Those that wait for it are not. But
# nothing here deletes what it guards, and who does it by hand does it to what serves nobody.)
GUARD = """
CREATE FUNCTION keep_what_requests_name() RETURNS trigger LANGUAGE plpgsql SET lock_timeout = '5s' AS $$
DECLARE
    requests text := format('%I.endpoints_mlrequest', TG_TABLE_SCHEMA);
    is_named boolean;
BEGIN
    IF TG_OP = 'UPDATE' AND NEW.id = OLD.id THEN
        RETURN NULL;
    END IF;
    EXECUTE format('LOCK TABLE %s IN SHARE MODE', requests);
    EXECUTE format('SELECT EXISTS (SELECT FROM %s WHERE %I = $1)', requests, TG_ARGV[0]) INTO is_named USING OLD.id;
    IF is_named THEN
        RAISE foreign_key_violation USING MESSAGE = format('%I %s is named by requests', TG_TABLE_NAME, OLD.id);
    END IF;
    RETURN NULL;
END $$
"""
ATTACH = """
CREATE CONSTRAINT TRIGGER keep_what_requests_name AFTER DELETE OR UPDATE OF id ON {table}
DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION keep_what_requests_name('{column}')
"""


def guard_by_triggers(apps, schema_editor):
    """PostgreSQL asks a foreign key's table for each row by itself, which takes as long as all else about the row."""
    if schema_editor.connection.vendor != 'postgresql':
        return
    with schema_editor.connection.cursor() as cursor:
        constraints = schema_editor.connection.introspection.get_constraints(cursor, REQUESTS)
    for name, constraint in constraints.items():
        if constraint['foreign_key'] and constraint['columns'][0] in NAMED:
            schema_editor.execute(f'ALTER TABLE {REQUESTS} DROP CONSTRAINT {schema_editor.quote_name(name)}')
    schema_editor.execute(GUARD, None)
    for column, table in NAMED.items():
        schema_editor.execute(ATTACH.format(table=table, column=column), None)


def guard_by_foreign_keys(apps, schema_editor):
    if schema_editor.connection.vendor != 'postgresql':
        return
    for column, table in NAMED.items():
        schema_editor.execute(f'DROP TRIGGER keep_what_requests_name ON {table}')
        schema_editor.execute(
            f'ALTER TABLE {REQUESTS} ADD CONSTRAINT {REQUESTS}_{column}_fk'
            f' FOREIGN KEY ({column}) REFERENCES {table} (id) DEFERRABLE INITIALLY DEFERRED'
        )
    schema_editor.execute('DROP FUNCTION keep_what_requests_name()')


class Migration(migrations.Migration):

    dependencies = [
        ('endpoints', '0009_keep_json_as_text'),
    ]

    operations = [
        migrations.RunPython(guard_by_triggers, guard_by_foreign_keys),
    ]
