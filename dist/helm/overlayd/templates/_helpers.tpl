{{- define "overlayd.name" -}}
{{ .Values.nameOverride | default .Chart.Name }}
{{- end }}

{{- define "overlayd.fullname" -}}
{{ .Values.fullnameOverride | default (include "overlayd.name" .) }}
{{- end }}

{{- /* labels of the pods; only the name selects them, since a selector can't be changed */ -}}
{{- define "overlayd.podLabels" -}}
app.kubernetes.io/name: {{ include "overlayd.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/part-of: overlayd
{{- end }}

{{- define "overlayd.labels" -}}
{{ include "overlayd.podLabels" . }}
app.kubernetes.io/version: {{ .Values.image.tag | default .Chart.AppVersion | trunc 63 | trimAll "-_." | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name (.Chart.Version | replace "+" "_") }}
{{- end }}

{{- /* takes a list of maps as YAML or values: the first that has a key counts, so that none is there twice */ -}}
{{- define "overlayd.merge" -}}
{{- $all := dict }}
{{- range . }}
{{- $all = merge $all (kindIs "string" . | ternary (. | toString | fromYaml) .) }}
{{- end }}
{{- toYaml $all }}
{{- end }}

{{- define "overlayd.image" -}}
{{- with .Values.image -}}
{{ .repository }}{{ if .digest }}@{{ .digest }}{{ else }}:{{ .tag | default $.Chart.AppVersion }}{{ end }}
{{- end }}
{{- end }}

{{- /* image and when to pull it, and resources, for a container */ -}}
{{- define "overlayd.container" -}}
image: {{ include "overlayd.image" . | quote }}
{{- with .Values.image.pullPolicy }}
imagePullPolicy: {{ . }}
{{- end }}
{{- with .Values.resources }}
resources:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "overlayd.imagePullSecrets" -}}
{{- $names := list }}
{{- range concat (.Values.imagePullSecrets | default list) ((.Values.global).imagePullSecrets | default list) }}
{{- $names = append $names (kindIs "map" . | ternary . (dict "name" .)) }}
{{- end }}
{{- with $names }}
imagePullSecrets:
  {{- uniq . | toYaml | nindent 2 }}
{{- end }}
{{- end }}

{{- /* what the pods of both DaemonSets have in common */ -}}
{{- define "overlayd.pod" -}}
hostNetwork: true
dnsPolicy: Default # the node's resolver: cluster DNS comes after us
{{- with .Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
enableServiceLinks: false
{{- with .Values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{ include "overlayd.podSecurityContext" . }}
{{- include "overlayd.imagePullSecrets" . }}
{{- end }}

{{- define "overlayd.podSecurityContext" -}}
securityContext:
  runAsUser: 0 # without root's powers; the files of the host belong to root
  runAsGroup: 0
  seLinuxOptions: # where SELinux is enforced, others can't write into directories of the host
    type: spc_t
  seccompProfile:
    type: RuntimeDefault
{{- end }}

{{- /* takes the capabilities to add */ -}}
{{- define "overlayd.securityContext" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
    {{- with . }}
    add: {{ toJson . }}
    {{- end }}
{{- end }}

{{- /* health and metrics on the node's address instead of loopback */ -}}
{{- define "overlayd.onNodeAddress" -}}
{{- if or .Values.healthz.onNodeAddress .Values.podMonitor.enabled }}true{{ end }}
{{- end }}

{{- define "overlayd.cniConflist" -}}
{{- .Values.cni.conflist | default (.Files.Get "files/cni.conflist") }}
{{- end }}

{{- define "overlayd.confNameFlag" -}}
{{ if ne .Values.cni.confName "10-overlayd.conflist" }}, --conf-name, {{ .Values.cni.confName }}{{ end }}
{{- end }}

{{- /* without its configuration, overlay-install has a directory that ends with the pod */ -}}
{{- define "overlayd.cniConfVolume" -}}
- name: cni-conf
  {{- if .Values.skipCNIConfigInstallation }}
  emptyDir: {}
  {{- else }}
  hostPath:
    path: {{ .Values.cni.confDir }}
    type: DirectoryOrCreate
  {{- end }}
{{- end }}

{{- /* etcd instead of the Kubernetes API */ -}}
{{- define "overlayd.etcd" -}}
{{- if .Values.etcd.endpoints }}true{{ end }}
{{- end }}

{{- /* the daemon's environment; when it changes, the pods are recreated */ -}}
{{- define "overlayd.settings" -}}
OVERLAYD_STORE: {{ include "overlayd.etcd" . | eq "true" | ternary "etcd" "kubernetes" }}
{{- with .Values.etcd.endpoints }}
OVERLAYD_ETCD_ENDPOINTS: {{ join "," . | quote }}
{{- end }}
{{- with .Values.etcd.prefix }}
OVERLAYD_ETCD_PREFIX: {{ . | quote }}
{{- end }}
{{- with .Values.kubeAnnotationPrefix }}
OVERLAYD_KUBE_ANNOTATION_PREFIX: {{ . | quote }}
{{- end }}
{{- with .Values.iface }}
OVERLAYD_IFACE: {{ join "," . | quote }}
{{- end }}
{{- if ne (int .Values.healthz.port) 8471 }}
OVERLAYD_HEALTHZ_PORT: {{ .Values.healthz.port | int | quote }}
{{- end }}
{{- range $flag, $value := .Values.settings }}
OVERLAYD_{{ $flag | upper | replace "-" "_" }}: {{ if kindIs "slice" $value }}{{ join "," $value | quote }}{{ else if kindIs "float64" $value }}{{ $value | int64 | quote }}{{ else }}{{ $value | quote }}{{ end }}
{{- end }}
{{- end }}
