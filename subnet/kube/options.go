// Package kube is the lease manager on the Kubernetes API. A node's subnets are the podCIDRs of its Node, which
// kube-controller-manager assigns; what peers must know of it stands in annotations of the Node, and the network config
// in a ConfigMap.
package kube

import (
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/transport"
)

const (
	// fieldManager is the name by which the API server knows which fields of a Node are this program's.
	fieldManager = "overlayd"
	// configKey is the key of the ConfigMap that has the network config: that of flannel's manifest.
	configKey = "net-conf.json"
	// answerWithin bounds how long the API server may take to answer a write, or to begin a watch; a whole list may take it
	// wholeList times as long: a minute, as by its own --request-timeout.
	answerWithin, wholeList = 15 * time.Second, 4
)

// Options say where the API is and who asks. The flags named in the errors are those of the overlayd command.
type Options struct {
	Kubeconfig       string // file; "": the service account of the pod
	Node             string // name of the Node that this process works for
	AnnotationPrefix string // of the annotations, without the slash
	ConfigMap        string // NAMESPACE/NAME
}

// DefaultOptions are those of a pod of the project's manifests; the node's name has to be added.
func DefaultOptions() Options {
	return Options{AnnotationPrefix: ownPrefix, ConfigMap: "kube-system/overlayd"}
}

// check says all that is wrong with the options, one line each.
func (o Options) check() error {
	var errs []error
	if o.Node == "" || len(validation.IsDNS1123Subdomain(o.Node)) > 0 {
		errs = append(errs, fmt.Errorf("--node-name: expected the name of a Node, found %q", o.Node))
	}
	if len(validation.IsQualifiedName(o.AnnotationPrefix+"/"+keyBackendData)) > 0 {
		errs = append(errs, fmt.Errorf("--kube-annotation-prefix: expected a DNS name such as %s, found %q",
			DefaultOptions().AnnotationPrefix, o.AnnotationPrefix))
	}
	namespace, name := o.configMap()
	if len(validation.IsDNS1123Label(namespace))+len(validation.IsDNS1123Subdomain(name)) > 0 {
		errs = append(errs, fmt.Errorf("--kube-config-map: expected NAMESPACE/NAME, found %q", o.ConfigMap))
	}
	return errors.Join(errs...)
}

func (o Options) configMap() (namespace, name string) {
	namespace, name, _ = strings.Cut(o.ConfigMap, "/")
	return namespace, name
}

// connection is how to ask the API server.
type connection struct {
	client *rest.RESTClient
	server string        // its URL
	within time.Duration // answerWithin, but for tests
}

// connect prepares the client; it connects when it is used. count sees each request, and seen the revision of each Node
// that a watch brings and that says what it did before.
func (o Options) connect(count func(*http.Request), seen func(revision int64)) (connection, error) {
	config, err := o.restConfig()
	if err != nil {
		return connection{}, err
	}
	config.GroupVersion, config.APIPath = &corev1.SchemeGroupVersion, "/api"
	config.NegotiatedSerializer = leanly{serializer.NewCodecFactory(newScheme()).WithoutConversion(), o, seen}
	config.AcceptContentTypes, config.ContentType = runtime.ContentTypeProtobuf, runtime.ContentTypeProtobuf
	config.UserAgent = "overlayd"
	config.WarningHandler = rest.NoWarnings{}
	config.QPS = -1                                 // the requests of one node are few, and each is paced where it is made
	if file := config.BearerTokenFile; file != "" { // read again when it is refused, too, not only once a minute
		config.BearerToken, config.BearerTokenFile = "", ""
		config.Wrap(transport.ResettableTokenSourceWrapTransport(transport.NewCachedFileTokenSource(file)))
	}
	config.Wrap(func(next http.RoundTripper) http.RoundTripper { return counter{next, count} })
	client, err := rest.RESTClientFor(config)
	if err != nil {
		return connection{}, fmt.Errorf("kube: %w", err)
	}
	return connection{client, config.Host, answerWithin}, nil
}

// newScheme has the kinds that are asked for.
func newScheme() *runtime.Scheme {
	s := runtime.NewScheme()
	s.AddKnownTypes(corev1.SchemeGroupVersion,
		&corev1.Node{}, &corev1.NodeList{}, &corev1.ConfigMap{}, &corev1.ConfigMapList{})
	metav1.AddToGroupVersion(s, corev1.SchemeGroupVersion)
	return s
}

func (o Options) restConfig() (*rest.Config, error) {
	if o.Kubeconfig == "" {
		config, err := rest.InClusterConfig()
		if errors.Is(err, rest.ErrNotInCluster) {
			err = errors.New("--store=kubernetes: no --kubeconfig is given, and this process is in no pod")
		}
		return config, err
	}
	config, err := clientcmd.BuildConfigFromFlags("", o.Kubeconfig)
	if err != nil {
		return nil, fmt.Errorf("--kubeconfig: %w", err)
	}
	return config, nil
}

// counter shows each request to a function that counts.
type counter struct {
	next  http.RoundTripper
	count func(*http.Request)
}

// RoundTrip is that of http.RoundTripper.
func (c counter) RoundTrip(r *http.Request) (*http.Response, error) {
	c.count(r)
	return c.next.RoundTrip(r)
}

// WrappedRoundTripper is by what client-go finds the transport whose connections it closes.
func (c counter) WrappedRoundTripper() http.RoundTripper { return c.next }

// addresses are those that a URL names: none if it has a host name.
func addresses(server string) []netip.Addr {
	u, err := url.Parse(server)
	if err != nil {
		return nil
	}
	ip, err := netip.ParseAddr(u.Hostname())
	if err != nil {
		return nil
	}
	return []netip.Addr{ip}
}
