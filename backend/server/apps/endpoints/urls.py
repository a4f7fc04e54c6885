from django.urls import include, path, re_path
from rest_framework.routers import SimpleRouter

from apps.endpoints import views
from apps.endpoints.models import ENDPOINT_NAME

PREFIX = "api/v1/"

# By itself, and to be tried first: it is asked for most, and each level of patterns costs a search.
predict = re_path(rf"^{PREFIX}(?P<endpoint_name>{ENDPOINT_NAME})/predict\Z", views.PredictView.as_view())

router = SimpleRouter(trailing_slash=False)
router.register("endpoints", views.EndpointViewSet, basename="endpoint")
router.register("mlalgorithms", views.MLAlgorithmViewSet, basename="mlalgorithm")
router.register("mlalgorithmstatuses", views.MLAlgorithmStatusViewSet, basename="mlalgorithmstatus")
router.register("mlrequests", views.MLRequestViewSet, basename="mlrequest")
router.register("batch-jobs", views.BatchJobViewSet, basename="batchjob")
router.register("abtests", views.ABTestViewSet, basename="abtest")

urlpatterns = [
    path("abtests/replay", views.ReplayView.as_view()),
    path("", include(router.urls)),
    path("stop_ab_test/<int:pk>", views.StopABTestView.as_view()),
    path("feedback", views.FeedbackView.as_view()),
    path("batch-predict", views.BatchPredictView.as_view()),
]
