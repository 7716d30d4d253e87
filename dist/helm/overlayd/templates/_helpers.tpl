{{- define "overlayd.labels" -}}
app.kubernetes.io/name: overlayd
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name (.Chart.Version | replace "+" "_") }}
{{- end }}

{{- define "overlayd.image" -}}
{{- with .Values.image -}}
{{ .repository }}{{ if .digest }}@{{ .digest }}{{ else }}:{{ .tag | default $.Chart.AppVersion }}{{ end }}
{{- end }}
{{- end }}

{{- /* image and when to pull it, for a container */ -}}
{{- define "overlayd.imageFields" -}}
image: {{ include "overlayd.image" . | quote }}
{{- with .Values.image.pullPolicy }}
imagePullPolicy: {{ . }}
{{- end }}
{{- end }}

{{- /* what all pods of the chart have in common */ -}}
{{- define "overlayd.pod" -}}
hostNetwork: true
dnsPolicy: Default # the node's resolver: cluster DNS comes after us
priorityClassName: system-node-critical
automountServiceAccountToken: false
enableServiceLinks: false
{{- with .Values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  runAsUser: 0 # without root's powers; the files of the host belong to root
  runAsGroup: 0
  seLinuxOptions: # where SELinux is enforced, others can't write into directories of the host
    type: spc_t
  seccompProfile:
    type: RuntimeDefault
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . | quote }}
  {{- end }}
{{- end }}
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

{{- /* the daemon's environment, and its files; when they change, the pods are recreated */ -}}
{{- define "overlayd.settings" -}}
OVERLAYD_ETCD_ENDPOINTS: {{ join "," .Values.etcd.endpoints | quote }}
{{- with .Values.etcd.prefix }}
OVERLAYD_ETCD_PREFIX: {{ . | quote }}
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

{{- define "overlayd.files" -}}
net-conf.json: |
  {{- .Values.network | toPrettyJson | nindent 2 }}
cni.conflist: |
  {{- include "overlayd.cniConflist" . | trim | nindent 2 }}
{{- end }}
