from django.db import migrations, models


def ended_tests_counted_until_their_end(apps, schema_editor):
    """What they have counted is dated by then: of a shadow all answers, as none was added after the end."""
    ended = apps.get_model('endpoints', 'ABTest').objects.filter(ended_at__isnull=False)
    ended.update(counted_until=models.F('ended_at'))
    answers = apps.get_model('endpoints', 'ShadowAnswer').objects.filter(
        abtest__design='shadow', created_at__gt=models.F('abtest__ended_at')
    )
    until = ended.filter(pk=models.OuterRef('abtest')).values('ended_at')
    answers.update(created_at=models.Subquery(until))


class Migration(migrations.Migration):

    dependencies = [
        ('endpoints', '0005_guardrail_of_both_designs'),
    ]

    operations = [
        migrations.AddField(
            model_name='abtest',
            name='counted_until',
            field=models.DateTimeField(editable=False, null=True),
        ),
        migrations.RunPython(ended_tests_counted_until_their_end, migrations.RunPython.noop),
    ]
