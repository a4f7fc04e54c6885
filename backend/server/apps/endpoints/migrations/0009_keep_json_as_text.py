from django.db import migrations

import apps.endpoints.fields

TABLE = 'endpoints_mlrequest'
NAMES = ('full_response', 'input_data')


def change_type(schema_editor, type):
    """All columns at once, as PostgreSQL writes the whole table anew."""
    changes = ', '.join(f'ALTER COLUMN {name} TYPE {type} USING {name}::{type}' for name in NAMES)
    schema_editor.execute(f'ALTER TABLE {TABLE} {changes}')


def edit_table(schema_editor, replaced):
    """By https://sqlite.org/lang_altertable.html, which has this for constraints: Django would copy all rows, twice."""
    with schema_editor.connection.cursor() as cursor:
        cursor.execute('PRAGMA schema_version')
        (version,) = cursor.fetchone()
        cursor.execute('PRAGMA writable_schema = ON')
        for name in NAMES:
            cursor.execute(
                "UPDATE sqlite_master SET sql = replace(sql, %s, %s) WHERE type = 'table' AND name = %s",
                [*replaced(name), TABLE],
            )
        cursor.execute(f'PRAGMA schema_version = {version + 1}')
        cursor.execute('PRAGMA writable_schema = OFF')


def without_and_with_check(name):
    text = f'"{name}" text NOT NULL'
    return text, f'{text} CHECK ((JSON_VALID("{name}") OR "{name}" IS NULL))'


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
        migrations.SeparateDatabaseAndState(
            database_operations=[migrations.RunPython(to_text, to_json)],
            state_operations=[
                migrations.AlterField('mlrequest', name, apps.endpoints.fields.JSONTextField(editable=False))
                for name in NAMES
            ],
        ),
    ]
