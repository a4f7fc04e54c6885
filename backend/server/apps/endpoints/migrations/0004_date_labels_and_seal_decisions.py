from django.db import migrations, models


def date_the_labels(apps, schema_editor):
    """Outcomes that were told before: since when each is known stands in its first change."""
    request = apps.get_model('endpoints', 'MLRequest')
    first = (
        apps.get_model('endpoints', 'FeedbackChange')
        .objects.filter(request=models.OuterRef('pk'))
        .order_by('id')
        .values('created_at')[:1]
    )
    request.objects.filter(feedback__isnull=False).update(labelled_at=models.Subquery(first))


SEALS = {
    'sqlite': [
        "CREATE TRIGGER decisions_are_never_changed BEFORE UPDATE ON endpoints_decision"
        " BEGIN SELECT RAISE(ABORT, 'a decision is never changed'); END"
    ],
    'postgresql': [
        "CREATE FUNCTION refuse_to_change_a_decision() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE EXCEPTION 'a decision is never changed' USING ERRCODE = 'restrict_violation'; END $$",
        "CREATE TRIGGER decisions_are_never_changed BEFORE UPDATE ON endpoints_decision"
        " FOR EACH ROW EXECUTE FUNCTION refuse_to_change_a_decision()",
    ],
}
UNSEALS = {
    'sqlite': ["DROP TRIGGER decisions_are_never_changed"],
    'postgresql': [
        "DROP TRIGGER decisions_are_never_changed ON endpoints_decision",
        "DROP FUNCTION refuse_to_change_a_decision()",
    ],
}


def seal_decisions(apps, schema_editor):
    for statement in SEALS.get(schema_editor.connection.vendor, ()):
        schema_editor.execute(statement, None)


def unseal_decisions(apps, schema_editor):
    for statement in UNSEALS.get(schema_editor.connection.vendor, ()):
        schema_editor.execute(statement, None)


class Migration(migrations.Migration):

    dependencies = [
        ('endpoints', '0003_evidence'),
    ]

    operations = [
        migrations.RunPython(date_the_labels, migrations.RunPython.noop),
        migrations.RunPython(seal_decisions, unseal_decisions),
    ]
