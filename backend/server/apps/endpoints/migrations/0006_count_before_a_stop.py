from django.db import migrations, models


def ended_tests_counted_until_their_end(apps, schema_editor):
    ended = apps.get_model('endpoints', 'ABTest').objects.filter(ended_at__isnull=False)
    ended.update(counted_until=models.F('ended_at'))


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
