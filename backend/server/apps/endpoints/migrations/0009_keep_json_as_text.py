from django.db import migrations

import apps.endpoints.fields

TABLE = 'endpoints_mlrequest'
NAMES = ('full_response', 'input_data')
CHECK = ' CHECK ((JSON_VALID("{0}") OR "{0}" IS NULL))'


def change_type(schema_editor, type):
    """All columns at once, as PostgreSQL writes the whole table anew."""
    changes = ', '.join(f'ALTER COLUMN {name} TYPE {type} USING {name}::{type}' for name in NAMES)
    schema_editor.execute(f'ALTER TABLE {TABLE} {changes}')


def edit_table(schema_editor, replaced):
    """By https://sqlite.org/lang_altertable.html, which has this for constraints: Django would copy all rows, twice."""
    with schema_editor.connection.cursor() as cursor:
        cursor.execute('PRAGMA schema_version')
        (version,) = cursor.fetchone()
        cursor.execute("SELECT sql FROM sqlite_master WHERE type = 'table' AND name = %s", [TABLE])
        (sql,) = cursor.fetchone()
        for name in NAMES:
            old, new = replaced(name)
            if sql.count(old) != 1 or CHECK.format(name) in sql.replace(old, ''):
                raise RuntimeError(f'{TABLE}.{name} is not laid out as expected, and was left alone: {sql}')
            sql = sql.replace(old, new)
        cursor.execute('PRAGMA writable_schema = ON')
        try:
            cursor.execute("UPDATE sqlite_master SET sql = %s WHERE type = 'table' AND name = %s", [sql, TABLE])
            cursor.execute(f'PRAGMA schema_version = {version + 1}')
        finally:
            cursor.execute('PRAGMA writable_schema = OFF')  # of the connection: no rollback ends it


def without_and_with_check(name):
    text = f'"{name}" text NOT NULL'
    return text, text + CHECK.format(name)


def to_text(apps, schema_editor):
    if schema_editor.connection.vendor == 'postgresql':
        change_type(schema_editor, 'text')
    elif schema_editor.connection.vendor == 'sqlite':
        edit_table(schema_editor, lambda name: reversed(without_and_with_check(name)))


def to_json(apps, schema_editor):
    if schema_editor.connection.vendor == 'postgresql':
        change_type(schema_editor, 'jsonb')
    elif schema_editor.connection.vendor == 'sqlite':
        edit_table(schema_editor, without_and_with_check)


class Migration(migrations.Migration):

    dependencies = [
        ('endpoints', '0008_kept_reports'),
    ]

    operations = [
        # By itself: within the other, sqlmigrate would run it instead of printing.
        migrations.RunPython(to_text, to_json),
        migrations.SeparateDatabaseAndState(
            state_operations=[
                migrations.AlterField('mlrequest', name, apps.endpoints.fields.JSONTextField(editable=False))
                for name in NAMES
            ],
        ),
    ]
